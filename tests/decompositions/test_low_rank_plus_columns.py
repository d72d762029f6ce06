"""Low rank plus whole input channels, against all choices of channels and against least squares for all factors."""

from itertools import combinations

import pytest
import torch
from cases import make_layer
from test_in_metrics import make_metric

from lowrank_pl.decompositions import SVD, Choice, LowRankPlusColumns
from lowrank_pl.layers import of_channels, spec_of
from lowrank_pl.metric import Metric
from lowrank_pl.ranks import CostBudget, CostPenalty, EnergyThreshold, RankProblem, enumerate_ranks
from lowrank_pl.structures import Chain, Constant, SomeChannels, Sum, sweep

NAMES = ("linear", "conv2d_strides", "conv2d_grouped", "transposed2d")
METHOD = LowRankPlusColumns()


def problem(name, kind=None):
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach().double()
    return spec, weight, None if kind is None else make_metric(spec, kind)[0]


def squared(metric, weight):
    return float(weight.square().sum()) if metric is None else metric.squared_norm(weight)


@pytest.mark.parametrize("kind", [None, "full", "samples", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_for_given_channels_nothing_is_nearer(name, kind):
    """Least squares for every factor in turn finds nothing better, neither from there nor from elsewhere."""
    spec, weight, metric = problem(name, kind)
    plain = Metric(spec) if metric is None else metric
    size, generator = spec.in_channels // spec.groups, torch.Generator().manual_seed(0)
    places = [torch.randperm(size, generator=generator)[:2].sort().values for _ in range(spec.groups)]
    found = METHOD.analyze(weight, spec, metric).on_channels((1, 2), torch.stack(places))
    energy, error = squared(metric, weight), squared(metric, weight - found.reconstruct())
    again = sweep(found.layout, found.tensors, weight, plain)
    assert squared(metric, weight - found.layout.weight(again)) >= error - 1e-7 * energy
    other = [x + 0.1 * torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in found.tensors]
    for _ in range(6):
        other = sweep(found.layout, other, weight, plain)
    assert squared(metric, weight - found.layout.weight(other)) >= error - 1e-7 * energy
    assert 1e-3 * energy < error < energy


@pytest.mark.parametrize("kind", [None, "full", "both"])
@pytest.mark.parametrize("name", ["linear", "conv2d_strides", "transposed2d"])
def test_channels_are_nearly_the_best(name, kind):
    """Of all that there are; for weights without any structure, of which every choice is nearly as good."""
    spec, weight, metric = problem(name, kind)
    analysis = METHOD.analyze(weight, spec, metric)
    for rank in ((1, 1), (2, 3), (3, 2)):
        errors = [
            squared(metric, weight - analysis.on_channels(rank, torch.tensor([places])).reconstruct())
            for places in combinations(range(spec.in_channels), rank[1])
        ]
        error = squared(metric, weight - analysis.factor(rank).reconstruct())
        assert min(errors) * (1 - 1e-9) <= error <= sorted(errors)[len(errors) // 4]
        assert kind is not None or error <= 1.1 * min(errors)


@pytest.mark.parametrize("name", NAMES)
def test_planted_channels_are_found(name):
    """Larger ones, and smaller ones than those that are of low rank."""
    spec, weight, _ = problem(name)
    size = spec.in_channels // spec.groups
    for scale in (10.0, 0.5):
        low = SVD().factor(weight, spec, (1,)).reconstruct()
        own = torch.tensor([1, size - 1])
        numbers = torch.cat([own + g * size for g in range(spec.groups)])
        planted = low + scale * of_zeros(spec, weight, numbers)
        structure = METHOD.factor(planted, spec, (1, len(own)))
        torch.testing.assert_close(structure.reconstruct(), planted, rtol=1e-9, atol=1e-9)
        channels = structure.tensors[structure.layout.parts[0].shapes().index((len(numbers),))]
        assert channels.tolist() == numbers.tolist()


def of_zeros(spec, weight, numbers):
    """The weight on these channels alone, written out with the axis along which PyTorch stores them."""
    kept = torch.zeros_like(weight)
    if spec.kind == "conv_transpose":
        kept[numbers] = weight[numbers]
        return kept
    size = spec.in_channels // spec.groups
    rows = spec.out_channels // spec.groups
    for number in numbers.tolist():
        g = number // size
        kept[g * rows : (g + 1) * rows, number % size] = weight[g * rows : (g + 1) * rows, number % size]
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_part_of_a_weight_for_some_channels(name):
    spec, weight, _ = problem(name)
    numbers = torch.tensor([g * (spec.in_channels // spec.groups) + 1 for g in range(spec.groups)], dtype=torch.int32)
    part = of_channels(weight, spec, numbers)
    assert part.shape == spec.with_(in_channels=spec.groups).stored_shape
    assert float(part.square().sum()) == pytest.approx(float(of_zeros(spec, weight, numbers.long()).square().sum()))


@pytest.mark.parametrize("name", NAMES)
def test_ranks_of_zero(name):
    """An SVD alone, the largest channels alone."""
    layer, x = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach()
    low = METHOD.factor(weight, spec, (2, 0))
    assert isinstance(low.layout, Chain)
    assert torch.equal(low.reconstruct(), SVD().factor(weight, spec, (2,)).reconstruct())
    columns = METHOD.factor(weight, spec, (0, 1))
    assert isinstance(columns.layout, SomeChannels)
    axes = [i for i in range(weight.dim()) if i != (0 if spec.kind == "conv_transpose" else 1)]
    kept = columns.reconstruct()
    assert float((kept * (weight - kept)).abs().sum()) == 0
    if spec.groups == 1:
        norms = weight.square().sum(axes)
        assert float(kept.square().sum()) == pytest.approx(float(norms.max()))
        assert columns.tensors[-1].tolist() == [int(norms.argmax())]
    for structure in (low, columns):
        dense = type(layer)(*arguments(layer)).double()
        dense.load_state_dict({**layer.state_dict(), "weight": structure.reconstruct()})
        torch.testing.assert_close(structure.to_module(layer.bias)(x), dense(x))
    assert isinstance(METHOD.layout(spec, (0, 0)), Constant)
    with pytest.raises(ValueError, match="Expected a rank from"):
        METHOD.factor(weight, spec, (0, 0))


def arguments(layer):
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features, layer.bias is not None
    if isinstance(layer, torch.nn.ConvTranspose2d):
        rest = (layer.output_padding, layer.groups, layer.bias is not None, layer.dilation)
    else:
        rest = (layer.dilation, layer.groups, layer.bias is not None)
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, *rest


def test_in_a_metric_the_columns_make_up_for_the_others():
    """With A alone it is the regression of the response to those channels."""
    spec, weight, metric = problem("linear", "full")
    structure = METHOD.analyze(weight, spec, metric).on_channels((0, 3), torch.tensor([[1, 4, 7]]))
    second = metric.inputs.matrix[0]
    best = torch.linalg.lstsq(second[[1, 4, 7]][:, [1, 4, 7]], (weight @ second)[:, [1, 4, 7]].mT).solution.mT
    torch.testing.assert_close(structure.tensors[0], best)


def test_rules_that_enumerate_use_both_entries():
    layer, _ = make_layer("conv2d")
    spec, weight = spec_of(layer), layer.weight.detach().double()
    weight[:, 2] *= 6
    each = RankProblem("conv", spec, METHOD, weight)
    table = enumerate_ranks(each, CostPenalty(1.0, "params").charged)
    ranks = [choice.rank for choice in table.choices if choice.decomposition is not None]
    assert {0} < {r for r, _ in ranks}
    assert {0} < {c for _, c in ranks}
    assert (0, 0) not in ranks
    for place in range(0, len(ranks), 7):
        choice, cost, error = table.choices[place], table.costs[place], table.errors[place]
        structure = each.structure(choice)
        assert structure.num_weights == cost
        assert squared(None, weight - structure.reconstruct()) <= error * (1 + 1e-9)
    (choice,) = CostBudget("params", 0.4)([each])
    assert choice.rank[1] == 1
    assert isinstance(each.structure(choice).layout, Sum)
    assert each.structure(choice).num_weights <= 0.4 * spec.num_weights
    (choice,) = EnergyThreshold(0.5)([each])
    assert choice == Choice(METHOD, choice.rank)
    error = squared(None, weight - each.structure(choice).reconstruct())
    assert error <= 0.25 * float(weight.square().sum())
    least = each.num_weights(choice.rank)
    smaller = [rank for rank in ranks if each.num_weights(rank) < least]
    bounds = [float(each.analysis(METHOD).tails((r,))[c]) for r, c in smaller]
    assert min(bounds) > 0.25 * float(weight.square().sum())
