"""Layers to operators and back."""

import pytest
import torch
from cases import LAYERS, make_layer
from torch import nn

from lowrank_pl.layers import as_operator, as_stored, spec_of
from lowrank_pl.structures import Chain, Dense, Structure

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("name", LAYERS)
def test_operator_entries(name):
    """`operator[t, s]` is the kernel from the s-th input of t's group to output t."""
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach()
    operator = as_operator(weight, spec)
    assert operator.shape == spec.operator_shape
    outputs, inputs = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    for t in range(spec.out_channels):
        for s in range(inputs):
            # stored as [S, T / groups, ...] there
            index = (t // outputs * inputs + s, t % outputs) if spec.kind == "conv_transpose" else (t, s)
            assert torch.equal(operator[t, s], weight[index])
    assert torch.equal(as_stored(operator, spec), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_built_with_a_weight(name, dtype):
    """From the stored weight, and from the operator."""
    layer, x = make_layer(name, dtype)
    spec = spec_of(layer)
    dense = Structure(Dense(spec), (), (layer.weight,))
    chain = Structure(Chain(spec, (spec,)), (), (as_operator(layer.weight, spec),))
    for build in (dense.to_module, lambda bias: chain.to_module(bias)[0]):
        for bias in {None, layer.bias}:
            built = build(bias)
            assert type(built) is type(layer)
            assert (built.bias is None) == (bias is None)
            for parameter in built.parameters():
                assert isinstance(parameter, nn.Parameter)
                assert parameter.is_leaf
                assert parameter.dtype == dtype
                assert parameter.is_contiguous()
        built = build(layer.bias)
        assert torch.equal(built(x), layer(x))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.zero_()
        assert layer.weight.count_nonzero()  # a copy
        assert layer.bias is None or layer.bias.count_nonzero()
