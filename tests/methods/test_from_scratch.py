"""Random factors against what the dense layer does to the variance of signals and gradients, by moments over draws."""

import math

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, spec_on, supports
from torch import nn

from lowrank_pl import SVD, CompressionRatio, EnergyThreshold, FixedRank, Targets, Tucker2, from_scratch
from lowrank_pl.compression import Compression
from lowrank_pl.decompositions import Choice, LowRankPlusColumns, LowRankPlusSparse
from lowrank_pl.extraction import RECORD
from lowrank_pl.layers import spec_of
from lowrank_pl.methods.from_scratch import factor_variances, random_structures
from lowrank_pl.planning import make_plan
from lowrank_pl.structures import Chain

# sums, and layers on some of their channels, are no products of factors, which alone can be random
PRODUCTS = [d for d in DECOMPOSITIONS if not isinstance(d, LowRankPlusColumns | LowRankPlusSparse)]
SUPPORTED = [(d, name) for d in PRODUCTS for name in LAYERS if supports(d, make_layer(name)[0])]
DRAWN = [
    (d, name)
    for d, name in SUPPORTED
    if name
    in ("linear_tokens", "conv2d_more_inputs", "conv2d_grouped", "conv2d_depthwise_twice", "transposed2d_strides")
]
DRAWS = 400
ALL = Targets(skip_first=False, skip_last=False)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def half(decomposition, spec):
    """About half of the full rank, in every entry."""
    return tuple(max(1, most // 2) for most in decomposition.full_rank(spec))


def is_chain_of_convolutions(layout):
    return isinstance(layout, Chain) and bool(layout.layer.kernel)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("decomposition", "name"), SUPPORTED, ids=lambda x: str(x).replace(" ", ""))
def test_every_value_of_the_weight_has_the_variance(decomposition, name, normed):
    """The sum over paths is linear in each factor: with independent values, variances go through it as values do."""
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    layout = decomposition.layout(spec, half(decomposition, spec))
    found = factor_variances(layout, 0.37, normed and bool(spec.kernel))
    each = [torch.full(shape, v, dtype=torch.float64) for shape, v in zip(layout.shapes(), found, strict=True)]
    torch.testing.assert_close(
        layout.weight(each), torch.full(spec.stored_shape, 0.37, dtype=torch.float64), rtol=1e-12, atol=0
    )
    if normed and is_chain_of_convolutions(layout):
        inputs = [math.prod(shape[1:]) for shape in layout.shapes()]
        assert [v * n for v, n in zip(found[:-1], inputs[:-1], strict=True)] == pytest.approx([1.0] * (len(found) - 1))


@pytest.mark.parametrize(("decomposition", "name"), DRAWN, ids=lambda x: str(x).replace(" ", ""))
def test_outputs_and_gradients_have_the_variance_of_the_dense_layer(decomposition, name, monkeypatch):
    """Over many draws of the factors, through the module that is deployed; the dense layer's moments in closed form."""
    torch.manual_seed(0)
    layer, x = make_layer(name)
    layer.bias, spec = None, spec_on(layer, x)
    plan = make_plan(nn.ModuleDict({"layer": layer}), decomposition, FixedRank(1), ALL)
    monkeypatch.setattr(Compression, "settled", lambda self, choice: choice)  # also where it is not cheaper
    outputs, gradients = 0.0, 0.0
    for _ in range(DRAWS):
        (structure,) = random_structures(plan, {"layer": Choice(decomposition, half(decomposition, spec))}).values()
        given = x.clone().requires_grad_()
        y = structure.to_module(None)(given)
        (back,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), given)
        outputs += float(y.detach().square().mean()) / DRAWS
        gradients += float(back.square().mean()) / DRAWS
    with torch.no_grad():
        layer.weight.fill_(float(layer.weight.square().mean()))
    given = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(layer(given).sum(), given)  # E g^2 = sum of v, of white gradients
    assert outputs == pytest.approx(float(layer(x.square()).detach().mean()), rel=0.15)  # E y^2 = sum of v x^2
    assert gradients == pytest.approx(float(back.mean()), rel=0.15)


@pytest.mark.parametrize("decomposition", [SVD(), Tucker2(), *PRODUCTS[3:]], ids=lambda x: str(x).replace(" ", ""))
def test_relative_steps_are_equal(decomposition):
    """Of all factors, where the gradient with respect to the weight is white: `E g^2 / v`, over draws."""
    torch.manual_seed(0)
    some = [nn.Conv2d(8, 24, 3).double(), *(make_layer(name)[0] for name in ("linear", "linear_tokens"))]
    spec = next(spec_of(layer) for layer in some if supports(decomposition, layer))
    layout = decomposition.layout(spec, half(decomposition, spec))
    variances = factor_variances(layout, 0.5)
    steps = torch.zeros(len(variances), dtype=torch.float64)
    for _ in range(200):
        factors = [
            (torch.randn(shape, dtype=torch.float64) * v**0.5).requires_grad_()
            for shape, v in zip(layout.shapes(), variances, strict=True)
        ]
        own = torch.autograd.grad((layout.weight(factors) * torch.randn(spec.stored_shape)).sum(), factors)
        steps += torch.tensor([float(g.square().mean()) / v for g, v in zip(own, variances, strict=True)])
    for members in layout.products():
        assert steps[list(members)].tolist() == pytest.approx([float(steps[members[0]])] * len(members), rel=0.1)


def test_two_factors_are_halfway_between_even_signals_and_even_gradients():
    spec = spec_on(nn.Linear(30, 12), torch.zeros(1, 30))
    first, second = factor_variances(SVD().layout(spec, (4,)), 0.1)
    signals, gradients = 30 * first / (4 * second), 4 * first / (12 * second)
    assert signals * gradients == pytest.approx(1)
    assert 4 * first * second == pytest.approx(0.1)


@pytest.mark.parametrize("normed", [False, True])
def test_a_network_begins_as_the_dense_one(normed):
    """Variances of a deep convolutional network's outputs, over draws of both, as relative to each other."""

    def net():
        layers = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(6)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
        return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])

    torch.manual_seed(0)
    x, dense, made = torch.randn(8, 16, 8, 8), [], []
    for _ in range(40):
        fresh = net()
        out = from_scratch(fresh, "spatial_svd", CompressionRatio(1.5), ALL, norm_between=normed).eval()
        dense.append(float(fresh(x).square().mean()))
        made.append(float(out(x).square().mean()))
    ratio = torch.tensor(made).log().mean().exp() / torch.tensor(dense).log().mean().exp()
    assert 0.6 < float(ratio) < 1.6


def test_draws_follow_the_seed_and_biases_are_kept():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 8))
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(from_scratch(net, "svd", FixedRank(2), ALL, example_input=torch.randn(2, 4, 4, 4)))
    states = [out.state_dict() for out in made]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert not torch.equal(states[0]["0.0.weight"], states[2]["0.0.weight"])
    assert torch.equal(states[2]["2.1.bias"], net[2].bias)


def test_the_model_is_unchanged_and_types_are_kept():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    out = from_scratch(net, "tucker2", FixedRank(2), ALL)
    assert {p.dtype for p in out.parameters()} == {torch.bfloat16}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_layer_that_starts_at_zero_stays_dense():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    nn.init.zeros_(net[1].weight)
    out = from_scratch(net, "svd", FixedRank(2), ALL)
    assert isinstance(out[1], nn.Conv2d)
    assert getattr(out, RECORD)["notes"]["1"] == "its weight starts at zero"


def test_what_does_not_go_together_is_refused():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"Expected a `rank` that follows from shapes.* but got EnergyThreshold"):
        from_scratch(net, "svd", {"0": FixedRank(2), "*": EnergyThreshold(0.9)}, ALL)
    with pytest.raises(ValueError, match="`norm_between` to be True or False but got 1"):
        from_scratch(net, "svd", FixedRank(2), ALL, norm_between=1)
    with pytest.raises(ValueError, match="Expected no argument `norm_between`: no convolution has become a chain"):
        from_scratch(net, "svd", FixedRank(2), ALL, norm_between=True)
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="Layer '1': expected finite weights"):
        from_scratch(net, "svd", FixedRank(2), ALL)
