"""Every rule in the metric of the layers' inputs: spectra are those of the responses, layers are comparable."""

import numpy as np
import pytest
import torch
from cases import RULES
from torch import nn

from lowrank_pl import CostBudget, EnergyThreshold, FixedRank, GreedyEnergy, Samples, Targets, make_plan
from lowrank_pl.decompositions import SVD, BlockSVD, Cheapest, SpatialSVD, Tucker2
from lowrank_pl.methods.collecting import collect
from lowrank_pl.tracing import record


@pytest.fixture(scope="module")
def seen():
    """A network of three convolutions, whose last layers answer more quietly, and what they are given."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU()
    ).eval()
    with torch.no_grad():
        net[4].weight.mul_(1e-2)
    x = torch.randn(40, 3, 12, 12).cumsum(-1).cumsum(-2) / 10
    return net, x, Samples([x], places=None)


def problems_of(seen, method="svd", rank=None, centred=True):
    net, x, samples = seen
    plan = make_plan(net, method, rank or FixedRank(1), Targets(skip_first=False), record(net, x[:1]))
    collected = collect(net, plan.compressions, samples)
    return plan, plan.problems(collected.metrics(plan, centred))


def responses(seen):
    """Eigenvalues of the covariance of what every convolution answers, from its outputs themselves."""
    net, x, _ = seen
    found = {}
    with torch.no_grad():
        for i, layer in enumerate(net):
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                rows = x.double().movedim(1, -1).flatten(0, -2).numpy()
                found[str(i)] = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1]
    return found


def test_spectra_are_those_of_the_responses(seen):
    _, problems = problems_of(seen)
    for name, values in responses(seen).items():
        (tails,) = problems[name].errors
        expected = np.append(values[::-1].cumsum()[::-1], 0)
        assert np.allclose(tails.numpy(), expected, rtol=1e-4, atol=1e-5 * expected[0])
        assert problems[name].cost_weight == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule(seen, rule):
    if getattr(rule, "cost", "") == "params" and getattr(rule, "ratio", 1) < 0.5:
        pytest.skip("not within reach")
    plan, problems = problems_of(seen, rank=rule)
    choices = plan.choose_ranks(problems)
    structures = plan.factor(choices, problems)
    assert choices.keys() == structures.keys() == {"0", "2", "4"}


@pytest.mark.parametrize("method", [SVD(), BlockSVD(4), SpatialSVD(), Tucker2(), Cheapest("svd", "spatial_svd")])
def test_every_structure_by_its_cost(seen, method):
    plan, problems = problems_of(seen, method, CostBudget("macs", 0.6))
    choices = plan.choose_ranks(problems)
    assert any(choice.decomposition is not None for choice in choices.values())


def test_greedy_energy_is_the_product_of_pca_energies(seen):
    """Zhang et al. (2016), 3.2.1: the ranks of all layers with the greatest product of kept shares of the responses'
    variance among those that cost no more; by brute force over all ranks of three layers, within the greedy gap."""
    plan, problems = problems_of(seen, rank=GreedyEnergy("params", 0.5))
    choices = plan.choose_ranks(problems)
    values, cost, rank = responses(seen), {}, {}
    for c in plan.compressions:
        layouts = [SVD().layout(c.layer, (r,)).num_weights for r in range(1, len(values[c.name]) + 1)]
        cost[c.name] = np.minimum(layouts, c.layer.num_weights)
        rank[c.name] = choices[c.name].rank[0] if choices[c.name].rank else len(values[c.name])
    kept = {name: np.log(each.cumsum() / each.sum()) for name, each in values.items()}
    spent = sum(cost[name][r - 1] for name, r in rank.items())
    a, b, c = kept
    total = cost[a][:, None, None] + cost[b][:, None] + cost[c]
    product = kept[a][:, None, None] + kept[b][:, None] + kept[c]
    best = product[total <= max(spent, 0.5 * sum(x.layer.num_weights for x in plan.compressions))].max()
    assert sum(kept[name][r - 1] for name, r in rank.items()) >= best - 0.05


def test_a_threshold_is_one_of_the_response(seen):
    plan, problems = problems_of(seen, rank=EnergyThreshold(0.6))
    choices = plan.choose_ranks(problems)
    for name, values in responses(seen).items():
        share = np.append(values[::-1].cumsum()[::-1], 0) / values.sum()
        expected = max(int((share > 0.16 * (1 + 1e-6)).sum()), 1)
        assert choices[name].rank == (expected,)


def test_quiet_layers_are_not_starved(seen):
    """Scaling what a layer answers by a hundredth changes no rank: errors count in proportion."""
    net = seen[0]
    plan, problems = problems_of(seen, rank=CostBudget("macs", 0.5))
    before = plan.choose_ranks(problems)
    with torch.no_grad():
        net[4].weight.mul_(100)
    try:
        plan, problems = problems_of(seen, rank=CostBudget("macs", 0.5))
        assert plan.choose_ranks(problems) == before
    finally:
        with torch.no_grad():
            net[4].weight.div_(100)
