"""Sizes and counts against the layers themselves and PyTorch's own counter."""

import json

import pytest
import torch
from cases import LAYERS, input_size, make_layer, spec_on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import build, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
each_layer = pytest.mark.parametrize("name", LAYERS)


def count_macs(module, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() // 2


@each_layer
def test_counts(name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    assert spec.num_weights == layer.weight.numel()
    assert spec.macs == count_macs(layer, x[:1])


@each_layer
def test_outputs(name):
    layer, x = make_layer(name)
    (size,) = spec_on(layer, x).outputs
    y = layer(x[:1])
    expected = (y.numel() // layer.out_features,) if isinstance(layer, nn.Linear) else (1, *y.shape[2:])
    assert size == expected


@each_layer
def test_counts_of_several_calls_add_up(name):
    layer, x = make_layer(name)
    larger = torch.cat([x, x], dim=1 if isinstance(layer, nn.Linear) else -1)
    if isinstance(layer, nn.Linear):
        larger = torch.cat([x, x])
    spec = spec_of(layer).with_(inputs=(input_size(layer, x), input_size(layer, larger)))
    assert spec.macs == count_macs(layer, x) + count_macs(layer, larger)
    assert spec_of(layer).macs is None


@each_layer
def test_dictionary_round_trip(name):
    layer, x = make_layer(name)
    values = json.loads(json.dumps(spec_on(layer, x).to_dict()))
    assert LayerSpec.from_dict(values) == spec_of(layer)


@each_layer
def test_build_is_the_inverse_of_spec_of(name):
    layer, _ = make_layer(name)
    built = build(spec_of(layer), bias=layer.bias is not None)
    assert type(built) is type(layer)
    assert spec_of(built) == spec_of(layer)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_then():
    convolution = spec_of(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"))
    following = convolution.with_(inputs=((3, 9, 8),)).then(5)
    assert following == spec_of(nn.Conv2d(6, 5, 1)).with_(inputs=((3, 4, 3),))
    assert spec_of(nn.Linear(4, 6)).then(5) == spec_of(nn.Linear(6, 5))
    assert spec_of(nn.ConvTranspose1d(4, 6, 3)).then(5) == spec_of(nn.Conv1d(6, 5, 1))


BAD_VALUES = {
    "kind": ["dense", None, 3],
    "in_channels": [0, -8, 8.0, "8", None, True, [8]],
    "out_channels": [0, -8, 8.0, "8", None],
    "kernel": [[0, 3], [3.0, 3], 3, None, "33", [[3], [3]], [], [3], [3, 3, 3], [3, 3, 3, 3]],
    "stride": [[0, 1], [1], 1, None, "same"],
    "padding": [[-1, 0], [1], "valid", "sane", 1, None, [0.5, 1]],
    "dilation": [[0, 1], [1], None],
    "output_padding": [[-1, 0], [1], "same", None],
    "groups": [0, 3, None, 1.0],
    "padding_mode": ["mirror", None, 0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_bad_dictionary(key, value):
    good = spec_of(nn.Conv2d(8, 12, 3)).to_dict()
    assert LayerSpec.from_dict(good)
    with pytest.raises(ValueError, match="Expected a layer"):
        LayerSpec.from_dict({**good, key: value})


@pytest.mark.parametrize("values", [None, [], "conv", {}, {"kind": "linear"}], ids=repr)
def test_not_a_layer(values):
    with pytest.raises(ValueError, match="Expected a layer with the keys"):
        LayerSpec.from_dict(values)
    with pytest.raises(ValueError, match="Expected a layer with the keys"):
        LayerSpec.from_dict({**spec_of(nn.Linear(2, 3)).to_dict(), "inputs": []})
