"""TT-layers against loops over the paper's formula, PyTorch's counter, and dense layers."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import TTLayer, core_shapes
from lowrank_pl.layers.tensor_train import contract, strides
from lowrank_pl.structures import Cores

SHAPES = [
    ((2, 3), (3, 2), 3), ((2, 3, 2), (3, 2, 2), 4), ((4, 1, 3), (1, 5, 2), 2), ((2, 2, 2, 3), (3, 2, 2, 2), 5),
    ((5, 1), (1, 7), 4), ((2, 2), (3, 4), 1),
]  # fmt: skip
each_shape = pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES, ids=str)
each_run = pytest.mark.parametrize("run", ["factors", "dense"])


def make(rows, columns, rank, run="factors", bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = TTLayer(LayerSpec("linear", math.prod(columns), math.prod(rows)), rows, columns, rank, bias, run).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(5, math.prod(columns), dtype=dtype)


def weight_of(layer):
    """Novikov et al. (2015), equation 2: `W(i; j) = G_1[i_1, j_1] ... G_d[i_d, j_d]`."""
    cores = [core.detach().numpy() for core in layer.cores]
    weight = np.empty((math.prod(layer.rows), math.prod(layer.columns)))
    for i, outputs in enumerate(itertools.product(*map(range, layer.rows))):
        for j, inputs in enumerate(itertools.product(*map(range, layer.columns))):
            matrix = np.eye(1)
            for core, m, n in zip(cores, outputs, inputs, strict=True):
                matrix = matrix @ core[:, m, n]
            weight[i, j] = matrix.item()
    return torch.from_numpy(weight)


@each_run
@each_shape
def test_forward(rows, columns, rank, run):
    layer, x = make(rows, columns, rank, run)
    weight = weight_of(layer)
    torch.testing.assert_close(layer.dense_weight().detach(), weight)
    for batch in (x, x[0], x[:0], x.reshape(5, 1, 1, -1)):
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(layer(batch).detach(), F.linear(batch, weight, layer.bias).detach())
    torch.testing.assert_close(F.linear(x, layer.weight), x @ weight.T, check_dtype=False)


@each_shape
def test_it_takes_the_cheaper_order(rows, columns, rank):
    layer, x = make(rows, columns, rank)
    counts = []
    for from_last in (False, True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = contract(x, layer.factors(), strides(core_shapes(rows, columns, rank), from_last), from_last)
        torch.testing.assert_close(y.reshape(5, -1) + layer.bias, layer(x))
        counts.append(counter.get_total_flops() // 2)
    spec = layer.spec.with_(inputs=((5,),))
    assert Cores(spec, rows, columns, rank, "factors").macs == min(counts)
    assert Cores(spec, rows, columns, rank).macs == min(*counts, 5 * layer.spec.num_weights)


@each_run
@each_shape
def test_gradients(rows, columns, rank, run):
    layer, x = make(rows, columns, rank, run)
    with torch.no_grad():
        layer(x)  # a weight remembered from here has no gradient
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x.requires_grad_(), *layer.parameters()))


@each_run
def test_the_weight_follows_the_cores(run):
    layer, x = make(*SHAPES[1], run)
    with torch.no_grad():
        before = layer(x)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        layer.cores[1].mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
        assert all(torch.equal(twin(x), before) for twin in twins)
        assert (layer._dense is not None) == (run == "dense")
        assert set(layer.state_dict()) == {"bias", "cores.0", "cores.1", "cores.2"}


@each_run
def test_bf16_autocast(run):
    layer, x = make(*SHAPES[1], run, dtype=torch.float32)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert float((y.float() - expected).norm()) <= 0.03 * float(expected.norm())
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


@each_run
@pytest.mark.parametrize("bias", [True, False])
def test_other_front_ends(run, bias):
    """On any batch; exported programs hold the cores and multiply by them."""
    layer, x = make(*SHAPES[3], run, bias, torch.float32)
    layer.eval()
    batches = {"x": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=batches)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        for other in (torch.jit.script(layer), torch.jit.trace(layer, x), torch.fx.symbolic_trace(layer), compiled):
            torch.testing.assert_close(other(x[:3]), layer(x[:3]), rtol=1e-4, atol=1e-3)
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(program.module()(x[:3]), layer(x[:3]), rtol=1e-4, atol=1e-3)
    assert torch.jit.script(layer)(x[0]).shape == layer(x[0]).shape
    assert sum(value.numel() for value in program.state_dict.values()) == sum(p.numel() for p in layer.parameters())
    macs = Cores(layer.spec.with_(inputs=((3,),)), layer.rows, layer.columns, layer.rank, "factors").macs
    dense = 3 * layer.spec.num_weights if run == "dense" else 0  # the layer itself, counted beside it
    assert counter.get_total_flops() // 2 == macs + (dense or macs)


@pytest.mark.parametrize(("rank", "compression"), [(1, 713614), (2, 194622), (4, 50972)])
def test_the_papers_compression(rank, compression):
    """Novikov et al. (2015), table 2: how many times fewer numbers than 25088 x 4096."""
    shapes = core_shapes((4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4), rank)
    assert 25088 * 4096 // sum(map(math.prod, shapes)) == compression


@each_run
def test_fresh_layer_is_initialized_like_a_dense_one(run):
    """A layer that nothing was loaded into trains: its outputs vary as little or as much as its inputs."""
    torch.manual_seed(0)
    layer = TTLayer(LayerSpec("linear", 256, 256), (4, 4, 4, 4), (4, 4, 4, 4), 8, False, run)
    assert 0.3 < float(layer(torch.randn(64, 256)).detach().std()) < 3
