"""Sums of layouts and sparse weights, on every kind of layer, against the dense layer with the weight written out."""

import copy
import io
import json
import pickle

import pytest
import torch
from cases import LAYERS, make_layer, some_ranks, spec_on

from lowrank_pl.decompositions import SVD
from lowrank_pl.layers import SumLayer, linear_of, packed, spec_of, tied
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric, columns_of
from lowrank_pl.structures import Constant, Dense, Sparse, Structure, Sum, layout_from_dict, sweep
from lowrank_pl.structures.base import total_macs

each_layer = pytest.mark.parametrize("name", LAYERS)
each_share = pytest.mark.parametrize("share", [0.02, 0.4])  # places, and a bit for every weight
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def make_sum(name, share, dtype=torch.float64):
    """A layer, a batch, the low-rank and the sparse weight, and the structure of both."""
    layer, x = make_layer(name, dtype)
    spec = spec_on(layer, x)
    count = max(round(share * spec.num_weights), 1)
    places = torch.randperm(spec.num_weights, generator=torch.Generator().manual_seed(3))[:count].sort().values
    low = SVD().factor(layer.weight, spec, some_ranks(SVD().full_rank(spec))[0])
    values = layer.weight.detach().flatten()[places]
    sparse = torch.zeros(spec.num_weights, dtype=dtype).index_put((places,), values).view(spec.stored_shape)
    layout = Sum(spec, (low.layout, Sparse(spec, count)))
    structure = Structure(layout, (*low.rank, count), (*low.tensors, values, packed(places, spec)))
    return layer, x, low.reconstruct(), sparse, structure


@each_share
@each_layer
def test_computes_what_the_dense_layer_does(name, share):
    layer, x, low, sparse, structure = make_sum(name, share)
    torch.testing.assert_close(structure.reconstruct(), low + sparse)
    dense = copy.deepcopy(layer)
    dense.weight.data = low + sparse
    for bias in {None, layer.bias}:
        dense.bias = bias
        module = structure.to_module(bias)
        assert isinstance(module, SumLayer)
        for batch in (x, x[:1], x[0], x[:0]):
            torch.testing.assert_close(module(batch), dense(batch))
            with torch.no_grad():
                torch.testing.assert_close(module(batch), dense(batch))
        torch.testing.assert_close(module.weight + 0, low + sparse)
        assert module.bias is None if bias is None else torch.equal(module.bias, bias)
        assert sum("bias" in key for key, _ in module.named_parameters()) == (bias is not None)


@each_share
@each_layer
def test_counting(name, share):
    *_, structure = make_sum(name, share)
    layout = structure.layout
    chain, sparse = layout.parts
    spec, stored = layout.layer, structure.tensors[-1]
    assert layout.num_weights == structure.num_weights == chain.num_weights + sparse.nonzeros
    assert layout.num_weights == sum(p.numel() for p in structure.to_module(None).parameters())
    assert (
        layout.index_bytes
        == stored.numel() * stored.element_size()
        == min(4 * sparse.nonzeros, -(-spec.num_weights // 8))
    )
    assert tuple(tuple(x.shape) for x in structure.tensors) == layout.shapes()
    assert layout.macs == chain.macs + spec.macs
    assert total_macs(sparse.stages) == sparse.nonzeros * spec.macs // spec.num_weights
    assert sum(stage.num_weights for stage in layout.stages) == layout.num_weights
    half = Sum(spec, tuple(type(part)(spec.with_(share=0.5), *list(vars(part).values())[1:]) for part in layout.parts))
    assert abs(half.parts[1].macs - spec.macs / 2) <= 1


@each_share
@each_layer
def test_round_trips(name, share):
    layer, x, _, _, structure = make_sum(name, share)
    spec, module = structure.layout.layer, structure.to_module(layer.bias)
    again = layout_from_dict(json.loads(json.dumps(structure.layout.to_dict())), spec)
    assert again == structure.layout
    assert hash(again) == hash(structure.layout)
    empty = again.build(layer.bias is not None).double()
    assert empty.state_dict().keys() == module.state_dict().keys()
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(x), module(x))
    found = again.tensors(module)
    assert all(map(torch.equal, found, structure.tensors))
    named = again.parameters(structure.tensors, layer.bias)
    assert named.keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in named.items())


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies(duplicate):
    layer, x, _, _, structure = make_sum("conv2d", 0.4)
    module = structure.to_module(layer.bias)
    with torch.no_grad():
        expected = module(x)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(module)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(module))
        else:
            torch.save(module, file := io.BytesIO())
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(x), expected)
        twin.branches[1].values.mul_(2)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(module(x), expected)


@each_share
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d_grouped", "transposed2d"])
def test_gradients(name, share):
    """Of the values and of the factors, as of the weight that they make."""
    layer, x, low, sparse, structure = make_sum(name, share)
    module, weight = structure.to_module(None), (low + sparse).requires_grad_()
    module(x).sin().sum().backward()
    dense = copy.deepcopy(layer)
    dense.bias = None
    torch.func.functional_call(dense, {"weight": weight}, (x,)).sin().sum().backward()
    torch.testing.assert_close(module.branches[1].values.grad, weight.grad[sparse != 0])


@pytest.mark.parametrize("kind", ["inputs", "both"])
@each_share
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d_grouped", "transposed2d"])
def test_refit_of_values_is_least_squares(name, share, kind):
    """Against the normal equations of all values, from the metric's own quadratic form."""
    layer, _, _, sparse, structure = make_sum(name, share)
    spec = spec_of(layer)
    generator = torch.Generator().manual_seed(0)
    size, rows = columns_of(spec), spec.out_channels // spec.groups
    x, g = (torch.randn(spec.groups, 3 * n, n, generator=generator, dtype=torch.float64) for n in (size, rows))
    metric = Metric(spec, Root.of(x.mT @ x), Root.of(g.mT @ g) if kind == "both" else None)
    target, layout = layer.weight.detach() + 1, Sparse(spec, int((sparse != 0).sum()))
    places = torch.nonzero(sparse.flatten()).flatten()
    units = torch.eye(spec.num_weights, dtype=torch.float64)[places].view(-1, *spec.stored_shape)
    gram = torch.stack([metric.times(unit).flatten()[places] for unit in units])
    best = torch.linalg.solve(gram, metric.times(target).flatten()[places])
    found, _ = layout.refit(structure.tensors[-2:], target, metric)

    def error(values):
        return metric.squared_norm(target - layout.weight((values, structure.tensors[-1])))

    start, after, least = error(structure.tensors[-2]), error(found), error(best)
    assert least * (1 - 1e-9) <= after <= least + 1e-3 * (start - least)


@each_share
@each_layer
def test_sums_come_nearer_in_a_metric(name, share):
    layer, _, _, _, structure = make_sum(name, share)
    spec, target = spec_of(layer), layer.weight.detach()
    size = columns_of(spec)
    x = torch.randn(spec.groups, 3 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = Metric(spec, Root.of(x.mT @ x))
    errors = [metric.squared_norm(target - structure.reconstruct())]
    refitted = structure.layout.refit(structure.tensors, target, metric)
    for tensors in (refitted, sweep(structure.layout, refitted, target, metric)):
        assert torch.equal(tensors[-1], structure.tensors[-1])
        errors.append(metric.squared_norm(target - structure.layout.weight(tensors)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0] * (1 - 1e-6) or errors[0] <= 1e-12 * metric.squared_norm(target)


def test_a_weight_that_others_multiply_by():
    """Goes through the branches, or is made whole."""
    layer, x, low, sparse, structure = make_sum("linear", 0.4)
    module, weight = structure.to_module(layer.bias), low + sparse
    torch.testing.assert_close(torch.nn.functional.linear(x, module.weight, module.bias), x @ weight.T + layer.bias)
    torch.testing.assert_close(x @ module.weight.T, x @ weight.T)
    torch.testing.assert_close(module.weight[2:4] * 2, weight[2:4] * 2)
    other = tied(module, torch.ones(10).double())
    torch.testing.assert_close(other(x), x @ weight.T + 1)
    assert other.branches[1].values is module.branches[1].values
    torch.testing.assert_close(module(x), x @ weight.T + layer.bias)
    assert isinstance(linear_of(module.weight + 0, None), torch.nn.Linear)


@each_share
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d_same_reflect", "transposed1d"])
def test_exports(name, share):
    layer, x, _, _, structure = make_sum(name, share, torch.float32)
    module = structure.to_module(layer.bias).eval()
    with torch.no_grad():
        expected = module(x)
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


SPEC = spec_of(torch.nn.Linear(6, 5))
SPARSE = {"kind": "sparse", "nonzeros": 7}
SUM = {"kind": "sum", "parts": [{"kind": "dense"}, SPARSE]}


@pytest.mark.parametrize(
    "values",
    [
        *[{**SPARSE, "nonzeros": bad} for bad in (-1, 31, 7.0, True, None)],
        {**SPARSE, "rank": 1},
        *[{**SUM, "parts": bad} for bad in ([], [SPARSE], "parts", None, [SPARSE, {}], [SPARSE, None], [SPARSE, SUM])],
    ],
    ids=repr,
)
def test_bad_dictionaries(values):
    with pytest.raises(ValueError, match="Expected"):
        layout_from_dict(values, SPEC)


def test_good_dictionaries():
    """Those that the bad ones differ from."""
    assert layout_from_dict(SPARSE, SPEC) == Sparse(SPEC, 7)
    assert layout_from_dict(SUM, SPEC) == Sum(SPEC, (Dense(SPEC), Sparse(SPEC, 7)))
    assert layout_from_dict({**SUM, "parts": [{"kind": "constant"}, SPARSE]}, SPEC).parts[0] == Constant(SPEC)
    assert Sum(SPEC, (Dense(SPEC), Sparse(SPEC, 7))).describe() == "dense + 7 nonzeros"
