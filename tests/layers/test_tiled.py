"""Both ways of running against the dense layer; when the dense weight is rebuilt; copies, modes, export."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, make_layer, supports
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.decompositions import TiledSVD
from lowrank_pl.layers import TiledLayer, spec_of

NAMES = [name for name in LAYERS if supports(TiledSVD(), make_layer(name)[0])]
RUNS = ("factors", "dense")
each_run = pytest.mark.parametrize("run", RUNS)
each_layer = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def make_tiled(name, run, tile=4, rank=2, dtype=torch.float64):
    """A dense layer, the tiled layer that approximates it, and a batch."""
    layer, x = make_layer(name, dtype)
    rank = min(rank, *TiledSVD(tile).full_rank(spec_of(layer)))
    return layer, TiledSVD(tile, run).factor(layer.weight, spec_of(layer), (rank,)).to_module(layer.bias), x


def weight_of(tiled):
    """The dense weight, tile by tile and group by group, from the layout that the docstring of the layer gives."""
    first, *others = tiled.spec.stored_shape
    transposed, groups = tiled.spec.kind == "conv_transpose", tiled.spec.groups
    rows, columns = (math.prod(others), first // groups) if transposed else (first // groups, math.prod(others))
    matrices = torch.zeros(groups, rows, columns, dtype=tiled.left[0].dtype)
    for g in range(groups):
        i_start, next_row = 0, 0
        regions = iter(zip(tiled.left, tiled.right, strict=True))
        while i_start < rows:
            j_start = 0
            while j_start < columns:
                left, right = next(regions)
                left, right = left.chunk(groups)[g], right.chunk(groups)[g]
                (m, height, _), (n, _, width) = left.shape, right.shape
                r = left.shape[2] // n
                for i in range(m):
                    for j in range(n):
                        tile = left[i][:, j * r : (j + 1) * r] @ right[j][i * r : (i + 1) * r]
                        y, x = i_start + i * height, j_start + j * width
                        matrices[g, y : y + height, x : x + width] = tile
                j_start += n * width
                next_row = i_start + m * height
            i_start = next_row
        assert next(regions, None) is None
    return (matrices.mT if transposed else matrices).reshape(tiled.spec.stored_shape)


def reference(layer, tiled, x):
    """The dense layer's own forward with the tiles' weight."""
    parameters = {"weight": weight_of(tiled)} | ({} if tiled.bias is None else {"bias": tiled.bias})
    return torch.func.functional_call(layer, parameters, (x,))


def dense_weight_is_held(tiled):
    """Whether a tensor other than a parameter hangs on the module."""
    return any(isinstance(x, torch.Tensor) for x in (tiled._dense or ()))


@each_run
@each_layer
def test_forward(name, run):
    for tile, rank in ((4, 2), (5, 1), (64, 3)):
        layer, tiled, x = make_tiled(name, run, tile, rank)
        for batch in (x, x[0], x[:0]):  # a batch, one input without a batch dimension, an empty batch
            expected = reference(layer, tiled, batch)
            torch.testing.assert_close(tiled(batch), expected)
            with torch.no_grad():
                torch.testing.assert_close(tiled(batch), expected)


@each_run
@each_layer
def test_gradients(name, run):
    layer, tiled, x = make_tiled(name, run)
    x.requires_grad_()
    targets = [x, *tiled.parameters()]
    with torch.no_grad():
        tiled(x)  # a weight remembered from here has no gradient
    gradients = torch.autograd.grad(tiled(x).sin().sum(), targets)
    references = torch.autograd.grad(reference(layer, tiled, x).sin().sum(), targets)
    for gradient, wanted in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, wanted)


@each_layer
def test_gradient_of_the_input_through_frozen_factors(name):
    layer, tiled, x = make_tiled(name, "dense")
    tiled.requires_grad_(False)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(tiled(x).sin().sum(), x)
    assert dense_weight_is_held(tiled)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference(layer, tiled, x).sin().sum(), x)[0])


@each_layer
def test_dense_run_costs_what_the_dense_layer_costs(name):
    layer, tiled, x = make_tiled(name, "dense")
    with torch.no_grad():
        tiled(x)
        counts = []
        for module in (tiled, layer):
            with FlopCounterMode(display=False) as counter:
                module(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def step(tiled):
    optimizer = torch.optim.SGD(tiled.parameters(), lr=0.1)
    for parameter in tiled.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def other_state(tiled):
    return {key: value + 1 for key, value in tiled.state_dict().items()}


def swap_data(tiled):
    for factor in tiled.left:
        factor.data = factor.data + 1


CHANGES = {
    "sgd": step,
    "load_state_dict": lambda tiled: tiled.load_state_dict(other_state(tiled)),
    "load_state_dict_assign": lambda tiled: tiled.load_state_dict(other_state(tiled), assign=True),
    "new_parameter": lambda tiled: tiled.left.__setitem__(0, nn.Parameter(tiled.left[0].detach() + 1)),
    "copy_": lambda tiled: tiled.right[0].detach().copy_(tiled.right[0] + 1),
    "new_data": swap_data,
    "float32": lambda tiled: tiled.to(torch.float32),
    "bias": lambda tiled: tiled.bias.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_dense_weight_follows_the_factors(change):
    layer, tiled, x = make_tiled("conv2d", "dense")
    with torch.no_grad():
        before = tiled(x)
        CHANGES[change](tiled)
        x = x.to(tiled.left[0].dtype)
        after = tiled(x)
        torch.testing.assert_close(after, reference(layer, tiled, x))
    assert change == "float32" or not torch.allclose(before, after)


def test_dense_weight_is_built_once():
    _, tiled, x = make_tiled("conv2d", "dense")
    with torch.no_grad():
        tiled(x)
        weight = tiled._dense[1]
        tiled(x)
    assert tiled._dense[1] is weight


def test_a_weight_built_in_a_mode_serves_outside_of_it():
    """Neither inference mode nor autocast may leave a trace in what later calls compute."""
    layer, tiled, x = make_tiled("conv2d", "dense", dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tiled(x)
    tiled.requires_grad_(False)
    x.requires_grad_()
    y = tiled(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(layer, tiled, x))


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_factors_only(duplicate):
    layer, tiled, x = make_tiled("conv2d", "dense")
    with torch.no_grad():
        expected = tiled(x)
        assert dense_weight_is_held(tiled)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(tiled)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(tiled))
        else:
            torch.save(tiled, file := io.BytesIO())
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert not dense_weight_is_held(twin)
        assert dense_weight_is_held(tiled)
        assert torch.equal(twin(x), expected)
        twin.left[0].add_(1)
        assert torch.equal(tiled(x), expected)
        torch.testing.assert_close(twin(x), reference(layer, twin, x))


def test_state_dict_holds_factors_only():
    _, tiled, x = make_tiled("conv2d", "dense")
    with torch.no_grad():
        tiled(x)
    regions = range(len(tiled.regions))
    assert set(tiled.state_dict()) == {"bias"} | {f"{side}.{i}" for side in ("left", "right") for i in regions}


@each_run
@pytest.mark.parametrize("name", ["linear", "linear_tokens", "conv2d", "conv2d_no_bias"])
def test_bf16_autocast(name, run):
    layer, tiled, x = make_tiled(name, run, rank=3, dtype=torch.float32)
    expected = reference(layer, tiled, x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = tiled(x)
            assert y.dtype == layer(x).dtype == torch.bfloat16
            assert float((y.detach().float() - expected).norm()) <= 0.02 * float(expected.norm())
        y.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tiled.parameters())


@each_run
@each_layer
def test_inference_mode(name, run):
    layer, tiled, x = make_tiled(name, run)
    expected = reference(layer, tiled, x)
    with torch.inference_mode():
        torch.testing.assert_close(tiled(x), expected)
        torch.testing.assert_close(tiled(x), expected)


@each_run
def test_made_in_inference_mode(run):
    with torch.inference_mode():
        layer, tiled, x = make_tiled("conv2d", run)
        torch.testing.assert_close(tiled(x), reference(layer, tiled, x))
        tiled.left[0].add_(1)
        torch.testing.assert_close(tiled(x), reference(layer, tiled, x))


@each_run
@pytest.mark.parametrize("name", ["linear_tokens", "conv2d", "conv2d_same_reflect", "conv3d_grouped", "transposed1d"])
def test_export(name, run):
    """The exported program holds factors, computes the same, and leaves nothing behind in the layer."""
    layer, tiled, x = make_tiled(name, run, dtype=torch.float32)
    tiled.eval()
    with torch.no_grad():
        expected = reference(layer, tiled, x)
        tiled(x)
        program = torch.export.export(tiled, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tiled(x), expected, rtol=1e-4, atol=1e-4)
    sizes = sum(value.numel() for value in program.state_dict.values())
    assert sizes == sum(parameter.numel() for parameter in tiled.parameters())


@pytest.mark.parametrize(("name", "run"), [("conv2d", "factors"), ("conv2d", "dense"), ("transposed2d", "factors")])
def test_compile(name, run):
    layer, tiled, x = make_tiled(name, run)
    compiled = torch.compile(tiled, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(layer, tiled, x))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), reference(layer, tiled, x))
            tiled.left[0].add_(1)


def test_channels_last():
    layer, tiled, x = make_tiled("conv2d", "factors")
    torch.testing.assert_close(tiled(x.to(memory_format=torch.channels_last)), reference(layer, tiled, x))


@each_run
def test_fresh_layer_is_initialized_like_a_dense_one(run):
    """A layer that nothing was loaded into trains: its outputs vary as little or as much as its inputs."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 256)
    tiled = TiledLayer(spec_of(dense), 32, 4, bias=True, run=run)
    spread = float(F.linear(torch.randn(64, 256), tiled.dense_weight()).std())
    assert 0.3 < spread < 3
