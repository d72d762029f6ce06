"""What every decomposition promises, on every kind of layer, against dense layers and PyTorch's own counter.

New decompositions are found by themselves; `cases.py` has to list an instance.
"""

import copy
import json
import sys

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, finals, make_layer, some_ranks, spec_on, supports
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.decompositions import Cheapest, Decomposition, Tucker2, count_macs, count_weights, module_from_dict
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import TiledLayer, spec_of

PAIRS = [(d, name) for d in DECOMPOSITIONS for name in LAYERS]
SUPPORTED = [(d, name) for d, name in PAIRS if supports(d, make_layer(name)[0])]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
each_pair = pytest.mark.parametrize(("decomposition", "name"), SUPPORTED, ids=lambda x: str(x).replace(" ", ""))


def middle(full):
    """A rank between the smallest and full."""
    ranks = some_ranks(full)
    return ranks[len(ranks) // 2]


def close(actual, expected, tolerance):
    """Whether the difference is at most so much of the norm."""
    error, norm = torch.linalg.vector_norm(actual - expected), torch.linalg.vector_norm(expected)
    return bool(error <= tolerance * norm)


class Products(TorchDispatchMode):
    """Notes the types that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_every_decomposition_has_an_instance():
    kinds = set(finals(Decomposition)) - {Cheapest}  # whose ranks mean something else: test_cheapest.py
    assert {type(d) for d in DECOMPOSITIONS} == kinds


@pytest.mark.parametrize("kind", list(finals(Decomposition)))
def test_final_and_frozen(kind):
    assert kind.__dict__.get("__final__", sys.version_info < (3, 11))
    assert kind.__dataclass_params__.frozen
    arguments = ("svd", "tucker2") if kind is Cheapest else ()
    assert kind(*arguments) == kind(*arguments)


@pytest.mark.parametrize(("decomposition", "name"), PAIRS, ids=lambda x: str(x).replace(" ", ""))
def test_unsupported(decomposition, name):
    layer, _ = make_layer(name)
    reason = decomposition.unsupported(spec_of(layer))
    if supports(decomposition, layer):
        assert reason is None
    else:
        assert isinstance(reason, str)
        assert reason.startswith("needs ")


@each_pair
def test_full_rank_changes_nothing(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    before = layer.weight.detach().clone()
    projected = decomposition.factor(layer.weight, spec, decomposition.full_rank(spec)).reconstruct()
    assert close(projected, before, 1e-12)
    assert torch.equal(layer.weight, before)
    assert not projected.requires_grad


@each_pair
def test_projections_do_not_depend_on_autocast_or_matmul_precision(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    rank = middle(decomposition.full_rank(spec))
    expected = decomposition.factor(layer.weight.float(), spec, rank)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            structure = decomposition.factor(layer.weight.float(), spec, rank)
            projected = structure.reconstruct()
    finally:
        torch.set_float32_matmul_precision(before)
    assert products.dtypes == {torch.float64}
    assert all(map(torch.equal, structure.tensors, expected.tensors))
    assert projected.dtype == torch.float32
    assert close(projected, expected.reconstruct(), 1e-6)


@each_pair
def test_spectra(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    full, spectra = decomposition.full_rank(spec), decomposition.analyze(layer.weight.detach(), spec).errors
    energy = float(layer.weight.detach().square().sum())
    assert [len(spectrum) for spectrum in spectra] == [most + 1 for most in full]
    for spectrum in spectra:
        assert spectrum.dtype == torch.float64
        assert float(spectrum[0]) == pytest.approx(energy, rel=1e-12)
        assert (spectrum.diff() <= 1e-15 * energy).all()
        assert abs(float(spectrum[-1])) <= 1e-15 * energy


@each_pair
def test_errors(decomposition, name):
    """The squared error is what the spectrum says, or at most the sum of several; it never grows with the rank."""
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    spectra = decomposition.analyze(layer.weight.detach(), spec).errors
    energy = float(layer.weight.detach().square().sum())
    errors = []
    for rank in some_ranks(decomposition.full_rank(spec)):
        projected = decomposition.factor(layer.weight, spec, rank).reconstruct()
        assert projected.shape == layer.weight.shape
        assert projected.dtype == layer.weight.dtype
        errors.append(float((layer.weight.detach() - projected).square().sum()))
        bound = sum(float(spectrum[r]) for spectrum, r in zip(spectra, rank, strict=True))
        if len(rank) == 1:
            assert errors[-1] == pytest.approx(bound, abs=1e-12 * energy)
        else:
            assert errors[-1] <= bound + 1e-12 * energy
            assert errors[-1] >= max(float(s[r]) for s, r in zip(spectra, rank, strict=True)) - 1e-12 * energy
    assert errors == sorted(errors, reverse=True) or max(errors) <= 1e-20 * energy


@each_pair
def test_module_computes_what_the_dense_layer_does(decomposition, name):
    layer, x = make_layer(name)
    spec = spec_of(layer)
    for rank in {(1,) * len(decomposition.full_rank(spec)), middle(decomposition.full_rank(spec))}:
        structure = decomposition.factor(layer.weight, spec, rank)
        dense = copy.deepcopy(layer)
        dense.weight.data = structure.reconstruct()
        module = structure.to_module(layer.bias)
        for batch in (x, x[:1], x[0]):  # one input without a batch dimension too
            y = module(batch)
            assert y.shape == dense(batch).shape
            assert close(y, dense(batch), 1e-10)


@each_pair
def test_parameters(decomposition, name):
    """As many as counted, of their own, to be trained."""
    layer, x = make_layer(name)
    spec, bias = spec_on(layer, x), layer.bias
    for rank in some_ranks(decomposition.full_rank(spec)):
        structure = decomposition.factor(layer.weight, spec, rank)
        module = structure.to_module(bias)
        parameters = list(module.parameters())
        weights = sum(p.numel() for p in parameters) - (0 if bias is None else bias.numel())
        assert weights == structure.num_weights == decomposition.layout(spec, rank).num_weights
        assert all(p.is_leaf and p.requires_grad and p.is_contiguous() for p in parameters)
        assert not any(p is layer.weight or p is bias for p in parameters)
        assert not list(module.buffers())
    without = structure.to_module(None)
    assert sum(p.numel() for p in without.parameters()) == structure.num_weights


@each_pair
def test_macs(decomposition, name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    for rank in some_ranks(decomposition.full_rank(spec)):
        structure = decomposition.factor(layer.weight, spec, rank)
        module = structure.to_module(layer.bias)
        with torch.no_grad():
            module(x)  # a layer that rebuilds its weight has done so
            with FlopCounterMode(display=False) as counter:
                module(x[:1])
        assert structure.macs == counter.get_total_flops() // 2
        if not isinstance(module, TiledLayer) or module.run == "factors":
            assert structure.macs == total_macs(decomposition.layout(spec, rank).stages)
    unseen = decomposition.factor(layer.weight, spec.with_(inputs=()), rank)
    assert unseen.macs is None


@each_pair
def test_bad_ranks(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    full = decomposition.full_rank(spec)
    low, high = (0, *full[1:]), (*full[:-1], full[-1] + 1)
    for rank in (low, high, (-1, *full[1:]), (*full, 1), full[1:], ()):
        with pytest.raises(ValueError, match="Expected a rank from"):
            decomposition.factor(layer.weight, spec, rank)


@each_pair
def test_not_finite(decomposition, name):
    for dtype in (torch.float32, torch.float64):
        layer, _ = make_layer(name, dtype)
        spec = spec_of(layer)
        for bad in (float("nan"), float("inf"), -float("inf")):
            layer.weight.data.view(-1)[-1] = bad
            with pytest.raises(ValueError, match="finite"):
                decomposition.factor(layer.weight, spec, middle(decomposition.full_rank(spec)))
            with pytest.raises(ValueError, match="finite"):
                decomposition.analyze(layer.weight.detach(), spec).errors


@each_pair
def test_projecting_twice_changes_nothing(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    rank = middle(decomposition.full_rank(spec))
    once = decomposition.factor(layer.weight, spec, rank).reconstruct()
    assert close(decomposition.factor(once, spec, rank).reconstruct(), once, 1e-12)


@each_pair
def test_zero_weights(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    zeros = torch.zeros_like(layer.weight)
    assert torch.equal(decomposition.factor(zeros, spec, middle(decomposition.full_rank(spec))).reconstruct(), zeros)


@each_pair
def test_module_from_dictionary(decomposition, name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    structure = decomposition.factor(layer.weight, spec, middle(decomposition.full_rank(spec)))
    for bias in {None, layer.bias}:
        module = structure.to_module(bias)
        values = json.loads(json.dumps(structure.layout.to_dict()))
        empty = module_from_dict(values, spec.with_(inputs=()), bias is not None).double()
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        assert {key: value.shape for key, value in empty.state_dict().items()} == shapes
        empty.load_state_dict(module.state_dict())
        assert torch.equal(empty(x), module(x))


@each_pair
def test_float32(decomposition, name):
    layer, x = make_layer(name, torch.float32)
    spec = spec_of(layer)
    full = decomposition.full_rank(spec)
    assert close(decomposition.factor(layer.weight, spec, full).reconstruct(), layer.weight, 1e-5)
    structure = decomposition.factor(layer.weight, spec, middle(full))
    dense = copy.deepcopy(layer)
    dense.weight.data = structure.reconstruct()
    module = structure.to_module(layer.bias)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert structure.reconstruct().dtype == torch.float32
    assert close(module(x), dense(x), 1e-5)
    exact = decomposition.factor(layer.weight.double(), spec, middle(full)).reconstruct()
    error, optimum = ((layer.weight.double() - w.double()).norm() for w in (structure.reconstruct(), exact))
    slack = 1e-3 if isinstance(decomposition, Tucker2) else 1e-6  # HOOI may stop elsewhere
    assert error <= (1 + slack) * optimum + 1e-6 * layer.weight.norm()


@each_pair
def test_bfloat16(decomposition, name):
    layer, _ = make_layer(name, torch.bfloat16)
    spec = spec_of(layer)
    projected = decomposition.factor(layer.weight, spec, decomposition.full_rank(spec)).reconstruct()
    assert projected.dtype == torch.bfloat16
    assert close(projected, layer.weight, 0.03)


@pytest.mark.parametrize(
    ("values", "bias"),
    [
        ({}, True),
        ({"kind": "dense"}, False),
        ({"kind": "chain", "stages": []}, True),
        ({"kind": "chain", "stages": [{"kind": "linear"}]}, True),
        ({"kind": "chain", "stages": "linear"}, True),
        ({"kind": "tiles", "tile": 4, "rank": 2, "run": "dense"}, True),
        ({"kind": "tiles", "tile": 4, "rank": 5, "run": "dense", "layer": {}}, True),
        ({"kind": "tiles", "tile": 4, "rank": 0, "run": "dense", "layer": {}}, True),
        ({"kind": "tiles", "tile": 4.0, "rank": 2, "run": "dense", "layer": {}}, True),
        ({"kind": "tiles", "tile": 4, "rank": 2, "run": "fast", "layer": {}}, True),
    ],
)
def test_bad_dictionary(values, bias):
    with pytest.raises(ValueError, match="Expected"):
        module_from_dict(values, LayerSpec("linear", 8, 8), bias)
