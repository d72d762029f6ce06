"""What every decomposition promises, on every kind of layer, against dense layers and PyTorch's own counter.

New decompositions are found by themselves; `cases.py` has to list an instance.
"""

import copy
import dataclasses
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, finals, make_layer, some_ranks, spec_on, supports
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.decompositions import (
    CP,
    DENSE,
    ZERO,
    Analysis,
    Choice,
    Decomposition,
    LowRankPlusColumns,
    LowRankPlusSparse,
    SeparableSVD,
    TensorTrain,
    TiledSVD,
    Tucker2,
)
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import (
    ConstantLayer,
    RebuildingLayer,
    spec_of,
)
from lowrank_pl.ranks import RankProblem
from lowrank_pl.structures import (
    Chain,
    Constant,
    Cores,
    Dense,
    Layout,
    SomeChannels,
    Sparse,
    Structure,
    Sum,
    Tiles,
    TwoForms,
    layout_from_dict,
    total_macs,
)

LINEAR = LayerSpec("linear", 8, 8)
TILES = {"kind": "tiles", "tile": 4, "rank": 2, "run": "dense", "layer": LINEAR.to_dict()}
PAIRS = [(d, name) for d in DECOMPOSITIONS for name in LAYERS]
SUPPORTED = [(d, name) for d, name in PAIRS if supports(d, make_layer(name)[0])]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
each_pair = pytest.mark.parametrize(("decomposition", "name"), SUPPORTED, ids=lambda x: str(x).replace(" ", ""))


def middle(full):
    """A rank between the smallest and full."""
    ranks = some_ranks(full)
    return ranks[len(ranks) // 2]


def shapes(decomposition, spec):
    return decomposition.layout(spec, decomposition.full_rank(spec)).shapes()


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
    assert {type(d) for d in DECOMPOSITIONS} == set(finals(Decomposition))


@pytest.mark.parametrize("kind", list(finals(Decomposition)))
def test_final_and_frozen(kind):
    assert kind.__dict__.get("__final__", sys.version_info < (3, 11))
    assert kind.__dataclass_params__.frozen
    assert kind() == kind()
    assert hash(kind()) == hash(kind())


@pytest.mark.parametrize("kind", [*finals(Layout), *finals(Analysis), Structure])
def test_layouts_structures_and_analyses_are_final_and_frozen(kind):
    assert kind.__dict__.get("__final__", sys.version_info < (3, 11))
    assert kind.__dataclass_params__.frozen
    assert kind.__dataclass_params__.eq == issubclass(kind, Layout)  # values; the others hold tensors


def test_every_layout_is_tested():
    assert set(finals(Layout)) == {Chain, Constant, Cores, Dense, SomeChannels, Sparse, Sum, Tiles}


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
    """The squared error is what the spectrum says, or at most what several say; it never grows with the rank."""
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    analysis = decomposition.analyze(layer.weight.detach(), spec)
    spectra = analysis.errors
    energy = float(layer.weight.detach().square().sum())
    errors = []
    for rank in some_ranks(decomposition.full_rank(spec)):
        projected = decomposition.factor(layer.weight, spec, rank).reconstruct()
        assert projected.shape == layer.weight.shape
        assert projected.dtype == layer.weight.dtype
        errors.append(float((layer.weight.detach() - projected).square().sum()))
        bound = float(analysis.tails(rank[:-1])[rank[-1]])
        truncations = len(shapes(decomposition, spec)) - 1 if isinstance(decomposition, TensorTrain) else len(rank)
        if isinstance(decomposition, CP):  # no spectrum: measured at some ranks, and interpolated
            assert -0.1 * energy <= errors[-1] - bound <= 0.1 * bound + 1e-12 * energy
            continue
        if truncations == 1:
            assert errors[-1] == pytest.approx(bound, abs=1e-12 * energy)
            continue
        assert errors[-1] <= bound * (1 + 1e-9) + 1e-12 * energy
        if isinstance(decomposition, LowRankPlusSparse):  # a sum: at most what each part leaves alone
            alone = float(spectra[-1][rank[-1]]), *(float(s[r]) for s, r in zip(spectra[:1], rank[:1], strict=True))
            assert errors[-1] <= (min(alone) if len(rank) == 2 else alone[0]) * (1 + 1e-9) + 1e-12 * energy
        elif not isinstance(decomposition, LowRankPlusColumns):
            largest = max(float(s[r]) for s, r in zip(spectra, rank, strict=True))
            assert errors[-1] >= largest * len(rank) / truncations - 1e-12 * energy
    assert all(after <= before + 1e-20 * energy for before, after in pairwise(errors))


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
        assert not any(buffer.is_floating_point() for buffer in module.buffers())  # they say where weights stand
        stored = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        assert stored == structure.layout.index_bytes
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
        if isinstance(structure.layout, Chain) or (isinstance(module, RebuildingLayer) and module.run == "factors"):
            assert structure.macs == total_macs(decomposition.layout(spec, rank).stages)
    unseen = decomposition.factor(layer.weight, spec.with_(inputs=()), rank)
    assert unseen.macs is None


@each_pair
def test_bad_ranks(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    full = decomposition.full_rank(spec)
    low, high = (decomposition.least_rank(spec)[0] - 1, *full[1:]), (*full[:-1], full[-1] + 1)
    for rank in (low, high, (-1, *full[1:]), (*full, 1), full[1:], (), (0,) * len(full)):
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
                decomposition.analyze(layer.weight.detach(), spec)


@pytest.mark.parametrize(
    ("decomposition", "name"),
    [pair for pair in SUPPORTED if not isinstance(pair[0], LowRankPlusSparse)],  # which ends in a local optimum
    ids=lambda x: str(x).replace(" ", ""),
)
def test_projecting_twice_changes_nothing(decomposition, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    rank, tolerance = middle(decomposition.full_rank(spec)), 1e-12
    if isinstance(decomposition, CP):  # whose iterations end before they have found many terms again
        rank, tolerance = some_ranks(decomposition.full_rank(spec))[1], 1e-3
    once = decomposition.factor(layer.weight, spec, rank).reconstruct()
    assert close(decomposition.factor(once, spec, rank).reconstruct(), once, tolerance)


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
        empty = layout_from_dict(values, spec.with_(inputs=())).build(bias is not None).double()
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
    slack = 1e-3 if isinstance(decomposition, Tucker2 | CP) else 1e-6  # iterations may stop elsewhere
    assert error <= (1 + slack) * optimum + 1e-6 * layer.weight.norm()


@each_pair
def test_bfloat16(decomposition, name):
    layer, _ = make_layer(name, torch.bfloat16)
    spec = spec_of(layer)
    projected = decomposition.factor(layer.weight, spec, decomposition.full_rank(spec)).reconstruct()
    assert projected.dtype == torch.bfloat16
    assert close(projected, layer.weight, 0.03)


def counted(module, x):
    """Multiply-adds by PyTorch's counter, of a layer that has run before."""
    with torch.no_grad():
        module(x)
        with FlopCounterMode(display=False) as counter:
            module(x)
    return counter.get_total_flops() // 2


def check_layout(structure, spec, layer, x):
    """Whatever a structure's layout says of it, against the tensors, the module and the layer that it replaces."""
    layout, tensors = structure.layout, structure.tensors
    assert layout.layer == spec
    assert tuple(tuple(tensor.shape) for tensor in tensors) == layout.shapes()
    indices = [tensor for tensor in tensors if not tensor.is_floating_point()]
    assert layout.index_bytes == sum(tensor.numel() * tensor.element_size() for tensor in indices)
    stored = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    assert layout.num_weights == structure.num_weights == stored
    assert sum(stage.num_weights for stage in layout.stages) == stored
    assert torch.equal(structure.reconstruct(), layout.weight(tensors))
    assert structure.reconstruct().shape == layer.weight.shape
    assert structure.macs == layout.macs == counted(structure.to_module(layer.bias), x[:1])
    for bias in {None, layer.bias}:
        module = structure.to_module(bias)
        filled, empty = module.state_dict(), layout.build(bias is not None)
        assert type(empty) is type(module)
        assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in filled.items()}
        named = layout.parameters(tensors, bias)
        assert named.keys() == filled.keys()
        assert all(torch.equal(named[key], filled[key]) for key in named)
        if bias is not None:
            (own,) = [value for key, value in filled.items() if key.split(".")[-1] == "bias"]
            assert torch.equal(own, bias)
        empty = empty.to(x.dtype)
        empty.load_state_dict(named)
        assert torch.equal(empty(x), module(x))
    return structure.to_module(None)


def check_round_trip(layout, spec):
    """By way of JSON, macs included; of a layer that nobody has seen too."""
    values = json.loads(json.dumps(layout.to_dict()))
    again = layout_from_dict(values, spec)
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.macs == layout.macs is not None
    unseen = layout_from_dict(values, spec.with_(inputs=()))
    assert unseen != layout
    assert unseen.shapes() == layout.shapes()
    assert unseen.macs == (0 if isinstance(layout, Constant) else None)
    assert unseen.to_dict() == layout.to_dict()


@each_pair
def test_a_layout_says_all_about_its_structure(decomposition, name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    for rank in some_ranks(decomposition.full_rank(spec)):
        structure = decomposition.factor(layer.weight, spec, rank)
        assert structure.layout == decomposition.layout(spec, rank) == Choice(decomposition, rank).layout(spec)
        assert structure.rank == rank
        forms = structure.layout.forms()
        assert structure.layout in forms or structure.layout.macs == forms[0].macs
        for form in forms:
            assert form.forms() == (form,)
            module = check_layout(structure.with_layout(form), spec, layer, x)
            check_round_trip(form, spec)
            factors = form.tensors(module)
            assert all(map(torch.equal, factors, structure.tensors))
            assert tuple(tuple(factor.shape) for factor in factors) == form.shapes()
        check_layout(structure, spec, layer, x)


@each_pair
def test_stages_are_what_runs(decomposition, name):
    """Each on what the one before it gives, from the layer's inputs to its outputs."""
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    structure = decomposition.factor(layer.weight, spec, middle(decomposition.full_rank(spec)))
    layout = structure.layout
    assert sum(stage.num_weights for stage in layout.stages) == structure.num_weights
    if isinstance(layout, TwoForms):
        module = structure.with_layout(layout.of_factors()).to_module(None)
        assert total_macs(layout.stages) == counted(module, x[:1])
        return
    if isinstance(decomposition, LowRankPlusSparse):  # a sparse part has no layer of PyTorch's
        assert layout.stages == tuple(stage for part in layout.parts for stage in part.stages)
        return
    seen, module = [], structure.to_module(None)
    for stages, links in rows_of_layers(layout, module):
        assert stages[0].inputs == spec.inputs
        assert stages[-1].outputs == spec.outputs
        for link in links:
            link.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    module(x[:1])
    for stage, (before, after) in zip(layout.stages, seen, strict=True):
        assert math.prod(before) == stage.in_channels * sum(math.prod(size) for size in stage.inputs)
        assert math.prod(after) == stage.out_channels * sum(math.prod(size) for size in stage.outputs)
        if stage.kind != "linear":
            assert tuple(before[2:]) == stage.inputs[0][1:]


def rows_of_layers(layout, module):
    """The stages that follow each other, with the layers that they are deployed as."""
    if isinstance(layout, Sum):
        pairs = zip(layout.parts, module.branches, strict=True)
        return [row for part, branch in pairs for row in rows_of_layers(part, branch)]
    if isinstance(layout, SomeChannels):
        return rows_of_layers(layout.inner, module.inner)
    return [(layout.stages, module if isinstance(layout, Chain) else [module])]


@pytest.mark.parametrize("name", LAYERS)
def test_choices_without_a_decomposition(name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    assert (DENSE.rank, ZERO.rank) == ((), (0,))
    assert {DENSE: 1, ZERO: 2}[Choice(None, ())] == 1
    dense, zero = DENSE.layout(spec), ZERO.layout(spec)
    assert (dense, zero) == (Dense(spec), Constant(spec))
    assert dense.forms() == (dense,)
    assert zero.forms() == (zero,)
    own = Structure(dense, DENSE.rank, (layer.weight.detach(),))
    module = check_layout(own, spec, layer, x)
    assert type(module) is type(layer)
    assert torch.equal(module.weight, layer.weight)
    assert torch.equal(own.to_module(layer.bias)(x), layer(x))
    assert dense.macs == counted(layer, x[:1])
    assert dense.stages == (spec,)
    nothing = Structure(zero, ZERO.rank, (layer.weight.new_empty(0),))
    module = check_layout(nothing, spec, layer, x)
    assert isinstance(module, ConstantLayer)
    assert module.layer == spec_of(layer)  # without this run's inputs
    assert not nothing.reconstruct().any()
    assert zero.macs == zero.num_weights == len(zero.stages) == 0
    check_round_trip(zero, spec)
    check_round_trip(dense, spec)


@pytest.mark.parametrize("name", [name for name in LAYERS if supports(TiledSVD(), make_layer(name)[0])])
def test_undecided_tiles(name):
    """Count and run as the dense layer until something has been measured."""
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    structure = TiledSVD(4).factor(layer.weight, spec, middle(TiledSVD(4).full_rank(spec)))
    layout = structure.layout
    assert layout.run is None
    assert [form.run for form in layout.forms()] == ["dense", "factors"]
    dense, factors = layout.forms()
    assert structure.macs == layout.macs == dense.macs == counted(layer, x[:1])
    assert factors.macs == counted(structure.with_layout(factors).to_module(None), x[:1]) == total_macs(layout.stages)
    assert structure.to_module(None).run == "dense"
    assert structure.to_module(None).spec == spec_of(layer)  # without this run's inputs
    assert [structure.with_layout(form).to_module(None).run for form in layout.forms()] == ["dense", "factors"]
    assert layout.to_dict() == dense.to_dict() != factors.to_dict()
    assert (bool(layout.note), bool(dense.note), bool(factors.note)) == (False, True, True)
    assert dense.note != factors.note


@each_pair
def test_a_bias_that_moves_with_the_weight(decomposition, name):
    """In the place of the layer's own, whether that has one or not."""
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    moved = torch.randn(spec.out_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rank = middle(decomposition.full_rank(spec))
    for plain in (
        decomposition.factor(layer.weight, spec, rank),
        Structure(Dense(spec), (), (layer.weight.detach(),)),
        Structure(Constant(spec), (0,), (layer.weight.new_empty(0),)),
    ):
        assert plain.bias is None
        structure = dataclasses.replace(plain, bias=moved)
        assert torch.equal(structure.reconstruct(), plain.reconstruct())
        assert (structure.num_weights, structure.macs) == (plain.num_weights, plain.macs)
        expected = plain.to_module(moved)(x)
        for same in (
            structure,
            structure.with_tensors(plain.tensors),
            structure.with_layout(plain.layout),
        ):
            for bias in {None, layer.bias}:
                module = same.to_module(bias)
                held = [p for key, p in module.named_parameters() if key.split(".")[-1] == "bias"]
                assert [torch.equal(p, moved) for p in held] == [True]
                assert held[0].data_ptr() != moved.data_ptr()
                assert torch.equal(module(x), expected)
        reference = copy.deepcopy(layer)
        reference.weight.data, reference.bias = plain.reconstruct(), torch.nn.Parameter(moved)
        assert close(expected, reference(x), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_pair
def test_one_analysis_serves_the_spectrum_and_the_factors(decomposition, name, dtype, monkeypatch):  # noqa: C901
    layer, x = make_layer(name, dtype)
    spec, calls, iterations = spec_on(layer, x), [], []
    for source in ("_gram_eigh", "_svd"):
        count(monkeypatch, f"lowrank_pl.linalg.svd.{source}", calls)
    count(monkeypatch, "lowrank_pl.linalg.tucker.leading_vectors", iterations)
    count(monkeypatch, "lowrank_pl.linalg.tensor_train.leading_vectors", iterations)
    ranks = some_ranks(decomposition.full_rank(spec))
    if isinstance(decomposition, LowRankPlusSparse):  # which decomposes again what its sparse part leaves
        ranks = []
    problem = RankProblem(name, spec, decomposition, layer.weight.detach())
    errors = [error.clone() for error in problem.errors]
    analyzed = len(calls)
    structures = [problem.structure(Choice(decomposition, rank)) for rank in ranks]
    assert all(map(torch.equal, problem.errors, errors))
    if isinstance(decomposition, LowRankPlusColumns):  # looks for channels, rank by rank
        assert analyzed == 1
        matrices = len(calls)
    elif isinstance(getattr(decomposition, "spectral", decomposition), Tucker2):
        matrices = 2  # the unfoldings; then those that it iterates over
        assert len(iterations) >= 2 * len(ranks)
    elif isinstance(decomposition, CP):
        matrices = 1 + sum(size > 1 for size in spec.kernel)  # the slices, and an unfolding for each other mode
    elif isinstance(decomposition, SeparableSVD):
        matrices = 2 + len(ranks)  # that of output PCA, and the spatial ones: of all outputs, then of so many each time
    elif isinstance(decomposition, TensorTrain):
        matrices = len(structures[0].tensors) - 1  # the unfoldings; then what is left of them, core by core
        assert len(iterations) == matrices * len(ranks)
    else:
        tiled = ranks and isinstance(structures[0].layout, Tiles)
        matrices = len(structures[0].tensors) // 2 if tiled else 1  # one per region
        assert not iterations
    assert len(calls) == matrices + len(iterations)
    problem.structure(DENSE)
    problem.structure(ZERO)
    assert len(calls) == matrices + len(iterations)
    for rank, structure in zip(ranks, structures, strict=True):
        alone = decomposition.factor(layer.weight, spec, rank)
        assert all(map(torch.equal, structure.tensors, alone.tensors))
        error = float((layer.weight.detach().double() - structure.reconstruct(torch.float64)).square().sum())
        if isinstance(decomposition, CP):
            continue
        bound = float(problem.analysis(decomposition).tails(rank[:-1])[rank[-1]])
        energy = float(errors[0][0])
        assert error <= bound * (1 + 1e-6) + (1e-12 if dtype == torch.float32 else 1e-20) * energy
        if len(rank) == 1 and not isinstance(decomposition, TensorTrain):
            assert error == pytest.approx(bound, rel=1e-4, abs=1e-12 * energy)


def count(monkeypatch, place, calls):
    """Note every call of the function at that place."""
    module, _, function = place.rpartition(".")
    original = getattr(sys.modules[module], function)
    monkeypatch.setattr(place, lambda *args, **options: calls.append(function) or original(*args, **options))


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "chain",
        {},
        {"kind": "chain", "stages": []},
        {"kind": "chain", "stages": [{"kind": "linear"}]},
        {"kind": "chain", "stages": "linear"},
        {"kind": "chain", "stages": [LINEAR.to_dict(), LINEAR.with_(out_channels=9).to_dict()]},
        {"kind": "chain", "stages": [LINEAR.with_(in_channels=9).to_dict(), LINEAR.to_dict()]},
        {"kind": "chain", "stages": [LINEAR.with_(out_channels=5).to_dict(), LINEAR.to_dict()]},
        {"kind": "constant", "rank": 0},
        {"kind": "tiles", "tile": 4, "rank": 2, "run": "dense"},
        {"kind": "tiles", "tile": 4, "rank": 5, "run": "dense", "layer": {}},
        *[
            {**TILES, **change}
            for change in (
                {"rank": 5},
                {"rank": 0},
                {"rank": 2.0},
                {"rank": True},
                {"tile": 9},
                {"tile": 4.0},
                {"tile": None},
                {"run": "fast"},
                {"run": None},
                {"layer": {}},
                {"layer": LINEAR.with_(in_channels=9).to_dict()},
            )
        ],
    ],
    ids=repr,
)
def test_bad_dictionary(values):
    with pytest.raises(ValueError, match="Expected"):
        layout_from_dict(values, LINEAR)


def test_good_dictionaries():
    """Those that the bad ones differ from."""
    assert layout_from_dict(TILES, LINEAR) == Tiles(LINEAR, 4, 2, "dense")
    stages = LINEAR.with_(out_channels=5), LINEAR.with_(in_channels=5)
    values = {"kind": "chain", "stages": [stage.to_dict() for stage in stages]}
    assert layout_from_dict(values, LINEAR) == Chain(LINEAR, stages)


@pytest.mark.parametrize("name", ["conv2d_depthwise", "transposed2d_grouped", "linear_one_input"])
def test_tiles_are_not_larger_than_a_group(name):
    spec = spec_of(make_layer(name)[0])
    with pytest.raises(ValueError, match="Expected"):
        layout_from_dict({**TILES, "layer": spec.to_dict()}, spec)


@each_pair
def test_layers_that_run_on_half_of_the_inputs(decomposition, name):
    """Cost half as much, in every form, and still do so when they have been read back."""
    whole, rank = spec_on(*make_layer(name)), middle(decomposition.full_rank(spec_on(*make_layer(name))))
    half = whole.with_(share=0.5)
    for form, other in zip(
        decomposition.layout(whole, rank).forms(), decomposition.layout(half, rank).forms(), strict=True
    ):
        again = layout_from_dict(other.to_dict(), half)
        assert abs(other.macs - form.macs / 2) <= 4  # one rounding a stage
        assert again.macs == other.macs
        assert again.num_weights == form.num_weights
