"""The layer at rank 0, beside the layer whose weight is zero."""

import copy

import pytest
import torch
from cases import LAYERS, make_layer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import Targets, compress, load_compressed, save_compressed, summarize
from lowrank_pl.decompositions import ZERO
from lowrank_pl.extraction import extract
from lowrank_pl.layers import ConstantLayer, spec_of
from lowrank_pl.planning import make_plan
from lowrank_pl.structures import Constant, Structure, layout_from_dict
from lowrank_pl.tracing import record

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def zero(layer):
    """Its weight as rank 0."""
    return Structure(Constant(spec_of(layer)), (0,), (layer.weight.new_empty(0),))


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layer_without_its_weight(name):
    layer, x = make_layer(name)
    with torch.no_grad():
        layer.weight.zero_()
    structure = zero(layer)
    constant = structure.to_module(layer.bias)
    inputs = [x] if isinstance(layer, nn.Linear) else [x, x[0]]  # unbatched too
    for each in inputs:
        expected, actual = layer(each), constant(each)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    assert torch.equal(structure.reconstruct(), layer.weight)
    assert structure.reconstruct().dtype == layer.weight.dtype
    assert structure.num_weights == structure.macs == 0
    with FlopCounterMode(display=False) as counter:
        constant(x)
    assert counter.get_total_flops() == 0


def test_it_can_be_written_to_trained_and_rebuilt():
    layer, x = make_layer("conv2d")
    constant = zero(layer).to_module(layer.bias)
    y = nn.functional.relu(constant(x), inplace=True)
    y.sum().backward()
    assert torch.equal(constant.bias, layer.bias)
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    assert torch.equal(constant.bias.grad, positions * (layer.bias > 0))
    again = layout_from_dict({"kind": "constant"}, spec_of(layer)).build(bias=True)
    again.load_state_dict(constant.state_dict())
    assert torch.equal(again(x), constant(x))


def test_it_is_exported():
    layer, x = make_layer("conv2d", torch.float32)
    constant = zero(layer).to_module(layer.bias).eval()
    program = torch.export.export(constant, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.equal(program.module()(x.repeat(3, 1, 1, 1)), constant(x.repeat(3, 1, 1, 1)))


def test_it_is_extracted_saved_loaded_and_counted(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    x = torch.randn(2, 3, 8, 8)
    trace = record(net, x)
    plan = make_plan(net, "svd", None, Targets(), trace)
    with torch.no_grad():
        net[2].weight.zero_()
    small = extract(net, plan, plan.factor({"2": ZERO}), {}, trace)
    assert isinstance(small[2], ConstantLayer)
    torch.testing.assert_close(small(x), net(x))
    save_compressed(small, tmp_path)
    again = load_compressed(copy.deepcopy(net), tmp_path)
    assert torch.equal(again(x), small(x))
    report = summarize(net, small, x)
    layer = report.layers[1]
    assert (layer.name, layer.structure, layer.compressed.macs) == ("2", "constant", 0)
    assert report.compressed.macs == report.dense.macs - layer.dense.macs
    assert "constant" in report.to_markdown()
    assert compress(net, "svd", example_input=x) is not None
