"""Against a grouped 1 x 1 convolution."""

import pytest
import torch
from torch import nn

from lowrank_pl.layers import GroupedLinear


def pair(inputs, outputs, groups, bias=True):
    """A grouped linear layer and the convolution with the same weights, in float64."""
    layer = GroupedLinear(inputs, outputs, groups, bias=bias).double()
    convolution = nn.Conv1d(inputs, outputs, 1, groups=groups, bias=bias).double()
    weights = {key: value.reshape(convolution.state_dict()[key].shape) for key, value in layer.state_dict().items()}
    convolution.load_state_dict(weights)
    return layer, convolution


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(12, 6, 3), (5, 7, 1), (4, 4, 4), (4, 12, 4), (12, 2, 2)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 5), (2, 3, 4), (0,)], ids=str)
def test_same_as_a_convolution(inputs, outputs, groups, bias, batch):
    layer, convolution = pair(inputs, outputs, groups, bias)
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    y, expected = layer(x), convolution(x.reshape(-1, inputs, 1)).reshape(*batch, outputs)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    references = torch.autograd.grad(expected.square().sum(), list(convolution.parameters()))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference.reshape(gradient.shape))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_the_type_that_a_linear_layer_gives(bias):
    x = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = GroupedLinear(12, 6, 3, bias=bias)(x)
        assert y.dtype == nn.Linear(12, 6, bias=bias)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 6), (12, 7)])
def test_bad_groups(inputs, outputs):
    with pytest.raises(ValueError, match=f"groups=3.*{inputs} inputs and {outputs} outputs"):
        GroupedLinear(inputs, outputs, 3)


def test_initialization_is_that_of_a_linear_layer():
    torch.manual_seed(0)
    layer, linear = GroupedLinear(512, 512, 4), nn.Linear(128, 512)  # as many inputs for every output
    assert float(layer.weight.detach().std()) == pytest.approx(float(linear.weight.detach().std()), rel=0.02)
    assert float(layer.bias.detach().std()) == pytest.approx(float(linear.bias.detach().std()), rel=0.2)
