"""Every rank that a layer may take, with its cost and its squared error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from lowrank_pl.costs import Cost, charge, price
from lowrank_pl.decompositions import Decomposition, Rank, alternatives, count_weights
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Where a rank has several entries (Tucker-2), at most so many values of each are tried, evenly spaced.
VALUES_PER_ENTRY = 64


@dataclass(frozen=True, eq=False)
class Enumeration:
    """`ranks` by growing cost, the smaller of two ranks of the same cost first; `costs` and squared `errors` beside
    them. The last is the full rank, which stands for the dense layer, unless a cap excludes it."""

    ranks: list[Rank]
    costs: Array
    errors: Array

    def best(self, lambda_: float, error_weight: float) -> int:
        """The place of the rank that minimizes `lambda_ * cost + error_weight * error`, the cheapest of several."""
        return int(np.argmin(lambda_ * self.costs + error_weight * self.errors))

    def index(self, rank: Rank) -> int:
        """The place of a rank."""
        return self.ranks.index(rank)


def enumerate_ranks(problem: RankProblem, cost: Cost) -> Enumeration:
    """All ranks of a layer that are cheaper than the dense layer, in weights and in cost, and the dense layer itself;
    with `least=0` rank 0 too.

    With a cap, `most`, only ranks up to it; the dense layer only where its full rank is no larger, as one of any of the
    structures. Raises `ValueError` with the layer's name for a cost that falls while the rank grows, and where no rank
    up to the cap is cheaper than the dense layer.
    """
    try:
        grids = _grids(problem.layer, problem.decomposition, cost)
        dense = dense_cost(problem.layer, cost)
    except ValueError as error:
        raise ValueError(f"Layer {problem.name!r}: {error}") from error
    ranks, costs, errors = [], [], []
    for start, decomposition, grid, prices, cheaper in grids:
        allowed = cheaper if problem.most is None else cheaper & (grid <= problem.most).all(axis=1)
        grid, prices = grid[allowed], prices[allowed]
        ranks += [(*start, *rank) for rank in grid.tolist()]
        costs.append(prices)
        errors.append(_errors(problem, start, decomposition, grid))
    may_be_dense = problem.most is None or any(grid[-1].max() <= problem.most for _, _, grid, *_ in grids)
    if not ranks and not may_be_dense:
        raise ValueError(
            f"Layer {problem.name!r}: no rank up to the cap of {problem.most} is cheaper than the dense layer: leave "
            "the layer out, or raise its cap"
        )
    if problem.least == 0:
        spectrum = problem.spectra if not grids[0][0] else problem.spectra_of(grids[0][1])
        ranks.append((0,) * len(problem.full))
        costs.append(np.zeros(1))
        errors.append(spectrum[0][:1].cpu().numpy())
    if may_be_dense:
        ranks.append(problem.full)
        costs.append(np.array([dense]))
        errors.append(np.zeros(1))
    all_costs, all_errors = np.concatenate(costs), np.concatenate(errors)
    order = np.argsort(all_costs, kind="stable")
    return Enumeration([ranks[i] for i in order], all_costs[order], all_errors[order])


def total_cost(layers: Sequence[LayerSpec], cost: Cost) -> float:
    """What dense layers cost together."""
    return sum(dense_cost(layer, cost) for layer in layers)


@cache
def dense_cost(layer: LayerSpec, cost: Cost) -> float:
    return charge(cost, layer)


@dataclass(frozen=True, eq=False)
class Descent:
    """The way down of a layer whose ranks are priced without a barrier at the dense layer: `ranks` by falling cost,
    those alone that nothing cheaper approximates as well, the first without error.

    `costs` are those of the factors, at every rank up to the full one. `accounted` is what is deployed there: the
    dense layer, while the factors are not `cheaper` than it in weights and in cost.
    """

    ranks: list[Rank]
    costs: Array
    errors: Array
    cheaper: Array
    accounted: Array


def descend(problem: RankProblem, cost: Cost) -> Descent:
    """Raises `ValueError` with the layer's name for a cost that falls while the rank grows."""
    try:
        grids = _grids(problem.layer, problem.decomposition, cost)
        dense = dense_cost(problem.layer, cost)
    except ValueError as error:
        raise ValueError(f"Layer {problem.name!r}: {error}") from error
    ranks: list[Rank] = []
    for start, _, grid, *_ in grids:
        ranks += [(*start, *rank) for rank in grid.tolist()]
    costs, cheaper = (np.concatenate([each[i] for each in grids]) for i in (3, 4))
    errors = np.concatenate([_errors(problem, start, each, grid) for start, each, grid, *_ in grids])
    order = np.lexsort((errors, costs))  # by growing cost, the better of two of the same cost first
    best = np.minimum.accumulate(errors[order])
    kept = order[np.flatnonzero(np.diff(best, prepend=np.inf) < 0)][::-1]
    return Descent(
        [ranks[i] for i in kept], costs[kept], errors[kept], cheaper[kept], np.where(cheaper, costs, dense)[kept]
    )


def _errors(problem: RankProblem, start: Rank, decomposition: Decomposition, grid: Array) -> Array:
    """The squared errors at the ranks of a grid; where a rank has several entries their sum, a bound."""
    spectra = problem.spectra if not start else problem.spectra_of(decomposition)
    return np.asarray(np.sum([s.cpu().numpy()[grid[:, i]] for i, s in enumerate(spectra)], axis=0))


@cache
def _grids(
    layer: LayerSpec, decomposition: Decomposition, cost: Cost
) -> list[tuple[Rank, Decomposition, Array, Array, Array]]:
    """Per structure: what its ranks begin with, itself, its ranks `[n, entries]`, their costs `[n]`, and which are
    cheaper than the dense layer, in weights and in cost.

    Remembered, because it depends on shapes alone and takes longer than everything that depends on the weights.
    """
    dense = dense_cost(layer, cost)
    found = []
    for start, each in alternatives(decomposition, layer):
        grid = _grid(each.full_rank(layer))
        prices = np.array([price(cost, layer, each, tuple(rank)) for rank in grid.tolist()])
        _check_growing(grid, prices)
        weights = np.array([count_weights(each.stages(layer, tuple(rank))) for rank in grid.tolist()])
        found.append((start, each, grid, prices, (weights < layer.num_weights) & (prices < dense)))
    return found


def _grid(full: Rank) -> Array:
    """All ranks up to the full one, or, where the rank has several entries, evenly spaced values of each."""
    steps = [1 if len(full) == 1 else -(-most // VALUES_PER_ENTRY) for most in full]
    axes = [sorted({1, *range(step, most + 1, step), most}) for most, step in zip(full, steps, strict=True)]
    return np.array(list(itertools.product(*axes)), dtype=int)


def _check_growing(grid: Array, prices: Array) -> None:
    costs = {tuple(rank): cost for rank, cost in zip(grid.tolist(), prices.tolist(), strict=True)}
    values = [sorted(set(column)) for column in grid.T.tolist()]
    for rank, cost in costs.items():
        for i, axis in enumerate(values):
            following = axis[axis.index(rank[i]) + 1 :][:1]
            larger = (*rank[:i], *following, *rank[i + 1 :])
            if following and costs.get(larger, cost) < cost:
                raise ValueError(
                    f"Expected a `cost` that does not fall with the rank, but rank {rank} costs {cost:g} and {larger} "
                    f"costs {costs[larger]:g}"
                )
