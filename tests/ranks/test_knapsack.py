"""The budget's ranks against brute force on tiny networks, and the search for large ones."""

from itertools import product

import numpy as np
import pytest
import torch
from optimum import least_loss
from torch import nn

from lowrank_pl.decompositions import DENSE, SVD, BlockSVD, Cheapest, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.layers import spec_of
from lowrank_pl.ranks import CostBudget, RankProblem, enumerate_ranks, knapsack
from lowrank_pl.ranks.knapsack import fill, improve, spent

STRUCTURES = [SVD(), SpatialSVD(), Tucker2(), BlockSVD(2), TiledSVD(4), Cheapest("svd", "spatial_svd", "tucker2")]


def tiny_network(seed):
    """Two to four small layers of any structures, weights and price factors."""
    rng = np.random.default_rng(seed)
    problems = []
    for k in range(rng.integers(2, 5)):
        decomposition = STRUCTURES[rng.integers(len(STRUCTURES))]
        inputs, outputs = (int(n) for n in 2 * rng.integers(2, 6, 2))
        linear = rng.random() < 0.3 and type(decomposition) in (SVD, BlockSVD, TiledSVD)
        layer = nn.Linear(inputs, outputs) if linear else nn.Conv2d(inputs, outputs, 3, padding=1)
        shape = tuple(layer.weight.shape)
        left, values, right = np.linalg.svd(rng.normal(size=(outputs, *shape[1:])).reshape(outputs, -1), False)
        values = rng.uniform(0.5, 2) * values * np.arange(1, len(values) + 1) ** -rng.uniform(0, 2)
        size = int(rng.integers(2, 9))
        spec = spec_of(layer).with_(inputs=((1,) if linear else (1, size, size),))
        weight = torch.from_numpy((left * values @ right).reshape(shape))
        cost_weight = 1.0 if seed % 3 else float(rng.uniform(0.2, 5))
        problems.append(RankProblem(f"layer{k}", spec, decomposition, weight, cost_weight, int(rng.integers(2))))
    return problems


def test_the_optimum_of_these_tests():
    """Against all pairs."""
    for seed in range(20):
        tables = [enumerate_ranks(problem, CostBudget("params").charged) for problem in tiny_network(seed)[:2]]
        budget = 0.4 * sum(table.costs[-1] for table in tables) + 0.6 * sum(table.costs[0] for table in tables)
        pairs = product(*(list(zip(table.costs, table.errors, strict=True)) for table in tables))
        best = min(a[1] + b[1] for a, b in pairs if a[0] + b[0] <= budget)
        assert least_loss([(table.costs, table.errors) for table in tables], budget) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_sixty_tiny_networks(cost):
    """The error, divided by the price factors, against the least of all combinations of ranks."""
    ratios = []
    for seed in range(60):
        problems = tiny_network(seed)
        tables = [enumerate_ranks(problem, CostBudget(cost).charged) for problem in problems]
        dense, least = (sum(table.costs[i] for table in tables) for i in (-1, 0))
        ratio = float(least / dense + np.random.default_rng(seed).uniform(0.02, 0.95) * (1 - least / dense))
        choices, lambda_ = CostBudget(cost, ratio).solve(problems, 1.0, ())
        places = [table.index(choice) for table, choice in zip(tables, choices, strict=True)]
        losses = [table.errors / p.cost_weight for table, p in zip(tables, problems, strict=True)]
        assert spent([table.costs for table in tables], places) <= ratio * dense
        best = least_loss([(t.costs, loss) for t, loss in zip(tables, losses, strict=True)], ratio * dense)
        ratios.append(spent(losses, places) / best)
        assert CostBudget(cost, ratio).solve(problems, 7.0, ())[0] == choices  # mu scales the lambda alone
        assert CostBudget(cost, ratio).solve(problems, 7.0, ())[1] == pytest.approx(7 * lambda_)
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) <= 1.0011  # 1.75 without exchanges


def many_layers(count, seed, steps):
    """Costs and errors by rank; the errors in stairs, which make Lagrange multipliers leave gaps."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(count):
        price, size = int(rng.integers(1, 200)), int(rng.integers(20, 60))
        energies = np.sort(rng.gamma(0.3, size=size))[::-1]
        tails = np.append(energies[::-1].cumsum()[::-1], 0)
        if steps:
            tails = np.ceil(tails / tails[0] * steps) * tails[0] / steps
        costs.append(np.append(np.arange(size * 0.6), size * 0.6) * price)
        losses.append(np.append(tails[: len(costs[-1]) - 1], 0))
    return costs, losses


def by_bisection(costs, losses, budget):
    """Each layer's best at the lambda that meets the budget, and that lambda."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        at = [int(np.argmin(loss + middle * cost)) for cost, loss in zip(costs, losses, strict=True)]
        low, high = (middle, high) if spent(costs, at) > budget else (low, middle)
    return [int(np.argmin(loss + high * cost)) for cost, loss in zip(costs, losses, strict=True)], high


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_two_hundred_layers(monkeypatch, steps, share):
    """Close to the bound, with a bounded number of partial choices in each layer."""
    costs, losses = many_layers(200, 0, steps)
    budget = share * sum(cost[-1] for cost in costs)
    start, price = by_bisection(costs, losses, budget)
    seen, frontier = [], knapsack._frontier
    monkeypatch.setattr(knapsack, "_frontier", lambda c, x, among: seen.append(len(c)) or frontier(c, x, among))
    places = fill(costs, losses, start, budget)
    places = improve(costs, losses, places, budget, price)
    assert spent(costs, places) <= budget
    bound = sum(float((x + price * c).min()) for c, x in zip(costs, losses, strict=True)) - price * budget
    assert bound * (1 - 1e-9) <= spent(losses, places) <= 1.003 * bound
    assert max(seen, default=0) <= knapsack.PAIRS_PER_LAYER
    assert len(seen) <= 2 * len(costs)


def test_filling_asks_each_layer_about_as_often_as_it_moves():
    """Not all layers again at every move."""
    costs, losses = many_layers(200, 1, 0)
    asked = []

    class Counting(np.ndarray):
        def __sub__(self, other):
            asked.append(1)
            return np.asarray(self) - np.asarray(other)

    start = [0] * len(costs)
    budget = 0.3 * sum(cost[-1] for cost in costs)
    places = fill([cost.view(Counting) for cost in costs], losses, start, budget)
    moves = sum(place > 0 for place in places)
    assert moves > 50
    assert len(asked) < 40 * len(costs)
    rest = budget - spent(costs, places)
    for cost, loss, place in zip(costs, losses, places, strict=True):  # no single one can be raised
        assert not np.any((cost > cost[place]) & (cost - cost[place] <= rest) & (loss < loss[place]))


def test_too_many_partial_choices_are_thinned_out(monkeypatch):
    """What is found then is still within the budget, and not worse than what it began with: here often better."""
    monkeypatch.setattr(knapsack, "PAIRS_PER_LAYER", 80)
    monkeypatch.setattr(knapsack, "PAIRS", 80)
    seen, frontier = [], knapsack._frontier
    monkeypatch.setattr(knapsack, "_frontier", lambda c, x, among: seen.append(len(c)) or frontier(c, x, among))
    better = 0
    for seed in range(20):
        costs, losses = many_layers(12, seed, 5)
        budget = 0.3 * sum(cost[-1] for cost in costs)
        start, price = by_bisection(costs, losses, budget)
        places = fill(costs, losses, start, budget)
        found = improve(costs, losses, places, budget, price)
        assert spent(costs, found) <= budget
        assert spent(losses, found) <= spent(losses, places)
        better += spent(losses, found) < spent(losses, places)
    assert better >= 7  # all that there are
    assert max(seen) <= 80


def test_weights_that_were_all_zeros_at_the_start_come_first():
    """Learning-compression divides by them: `cost_weight` is 0 there."""
    problems = tiny_network(1)
    zero = [RankProblem("zero", problems[0].layer, SVD(), problems[0].weight, 0.0, 0), *problems[1:]]
    with np.errstate(all="raise"):
        choices = CostBudget("params", 0.7)(zero)
        assert choices[0] == DENSE
        tight = CostBudget("params", 0.1)(zero)
    assert tight[0] != DENSE
    assert CostBudget("params", 0.5)([zero[0]])[0] != DENSE


def test_a_budget_just_reachable():
    """Also where the costs are not whole numbers, and sums of them are rounded."""

    def cost(layer):
        return layer.num_weights**0.7 / 3

    for seed in range(30):
        problems = tiny_network(seed)
        problems, others = problems[1:], [problems[0].layer]
        tables = [enumerate_ranks(problem, cost) for problem in problems]
        dense = sum(cost(problem.layer) for problem in problems) + cost(others[0])
        least = sum(table.costs[0] for table in tables) + cost(others[0])
        try:
            choices = CostBudget(cost, least / dense)(problems, 1.0, others)
        except ValueError:  # by the last bit
            continue
        assert choices == [table.choices[0] for table in tables]
