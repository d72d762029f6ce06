"""Every rank that a layer may take, with its cost and its squared error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from lowrank_pl.costs import Cost, charge, price
from lowrank_pl.decompositions import DENSE, ZERO, Candidates, Choice, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem
from lowrank_pl.structures import Rank

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Where a rank has several entries (Tucker-2), at most so many values of each are tried, evenly spaced.
VALUES_PER_ENTRY = 64


@dataclass(frozen=True, eq=False)
class Enumeration:
    """`choices` by growing cost, the smaller of two ranks of the same cost first; `costs` and squared `errors` beside
    them. The last is the dense layer, unless a cap excludes it."""

    choices: list[Choice]
    costs: Array
    errors: Array

    def best(self, lambda_: float, error_weight: float) -> int:
        """The place of the choice that minimizes `lambda_ * cost + error_weight * error`, the cheapest of several."""
        return int(np.argmin(lambda_ * self.costs + error_weight * self.errors))

    def index(self, choice: Choice) -> int:
        """The place of a choice."""
        return self.choices.index(choice)


def enumerate_ranks(problem: RankProblem, cost: Cost, most: int | None = None) -> Enumeration:
    """All ranks of a layer that are cheaper than the dense layer, in weights and in cost, and the dense layer itself;
    with `least=0` rank 0 too.

    With a cap, `most`, only ranks up to it in every entry; the dense layer only where its full rank is no larger, as
    one of any of the structures. Raises `ValueError` with the layer's name for a cost that falls while the rank grows,
    and where no rank up to the cap is cheaper than the dense layer.
    """
    with problem.named():
        grids = _grids(problem.layer, problem.method, cost)
        dense = dense_cost(problem.layer, cost)
    allowed = [grid.cheaper & (grid.ranks <= (most or math.inf)).all(axis=1) for grid in grids]
    choices = [grid.choices[i] for grid, fits in zip(grids, allowed, strict=True) for i in np.flatnonzero(fits)]
    costs = [grid.costs[fits] for grid, fits in zip(grids, allowed, strict=True)]
    errors = [grid.errors(problem)[fits] for grid, fits in zip(grids, allowed, strict=True)]
    may_be_dense = most is None or any(grid.ranks[-1].max() <= most for grid in grids)
    if not choices and not may_be_dense:
        raise ValueError(
            f"Layer {problem.name!r}: no rank up to the cap of {most} is cheaper than the dense layer: leave the layer "
            "out, or raise its cap"
        )
    if problem.least == 0:
        choices.append(ZERO)
        costs.append(np.zeros(1))
        errors.append(problem.errors[0][:1].cpu().numpy())
    if may_be_dense:
        choices.append(DENSE)
        costs.append(np.array([dense]))
        errors.append(np.zeros(1))
    all_costs, all_errors = np.concatenate(costs), np.concatenate(errors)
    order = np.argsort(all_costs, kind="stable")
    return Enumeration([choices[i] for i in order], all_costs[order], all_errors[order])


def total_cost(layers: Sequence[LayerSpec], cost: Cost) -> float:
    """What dense layers cost together."""
    return sum(dense_cost(layer, cost) for layer in layers)


@cache
def dense_cost(layer: LayerSpec, cost: Cost) -> float:
    """What one dense layer costs."""
    return charge(cost, layer)


@dataclass(frozen=True, eq=False)
class Descent:
    """The way down of a layer whose ranks are priced without a barrier at the dense layer: `choices` by falling cost,
    those alone that nothing cheaper approximates as well, the first without error.

    `costs` are those of the factors, at every rank up to the full one. `accounted` is what is deployed there: the
    dense layer, while the factors are not `cheaper` than it in weights and in cost.
    """

    choices: list[Choice]
    costs: Array
    errors: Array
    cheaper: Array
    accounted: Array


def descend(problem: RankProblem, cost: Cost) -> Descent:
    """Raises `ValueError` with the layer's name for a cost that falls while the rank grows."""
    with problem.named():
        grids = _grids(problem.layer, problem.method, cost)
        dense = dense_cost(problem.layer, cost)
    choices = [choice for grid in grids for choice in grid.choices]
    costs, cheaper = np.concatenate([g.costs for g in grids]), np.concatenate([g.cheaper for g in grids])
    errors = np.concatenate([grid.errors(problem) for grid in grids])
    order = np.lexsort((errors, costs))  # by growing cost, the better of two of the same cost first
    best = np.minimum.accumulate(errors[order])
    kept = order[np.flatnonzero(np.diff(best, prepend=np.inf) < 0)][::-1]
    accounted = np.where(cheaper, costs, dense)
    return Descent([choices[i] for i in kept], costs[kept], errors[kept], cheaper[kept], accounted[kept])


@dataclass(frozen=True, eq=False)
class _Grid:
    """The ranks of one decomposition `[n, entries]`, also as choices, their costs `[n]`, and which are cheaper than the
    dense layer, in weights and in cost."""

    decomposition: Decomposition
    ranks: Array
    choices: list[Choice]
    costs: Array
    cheaper: Array

    def errors(self, problem: RankProblem) -> Array:
        """The squared errors, or bounds of them."""
        return np.array(problem.analysis(self.decomposition).errors_at([choice.rank for choice in self.choices]))


@cache
def _grids(layer: LayerSpec, method: Candidates, cost: Cost) -> list[_Grid]:
    """One for every decomposition to choose among.

    Remembered, because it depends on shapes alone and takes longer than everything that depends on the weights.
    """
    dense = dense_cost(layer, cost)
    found = []
    for decomposition in method.candidates(layer):
        ranks = _some_ranks(decomposition.full_rank(layer), decomposition.least)
        choices = [Choice(decomposition, tuple(rank)) for rank in ranks.tolist()]
        layouts = [choice.layout(layer) for choice in choices]
        costs = np.array([price(cost, choice, layout) for choice, layout in zip(choices, layouts, strict=True)])
        _check_growing(ranks, costs)
        weights = np.array([layout.num_weights for layout in layouts])
        cheaper = (weights < layer.num_weights) & (costs < dense)
        some = np.flatnonzero(ranks.any(axis=1))  # no entry at all is `ZERO`
        found.append(_Grid(decomposition, ranks[some], [choices[i] for i in some], costs[some], cheaper[some]))
    return found


def _some_ranks(full: Rank, least: int) -> Array:
    """All ranks up to the full one, or, where the rank has several entries, evenly spaced values of each."""
    steps = [1 if len(full) == 1 else -(-most // VALUES_PER_ENTRY) for most in full]
    axes = [sorted({least, 1, *range(step, most + 1, step), most}) for most, step in zip(full, steps, strict=True)]
    return np.array(list(itertools.product(*axes)), dtype=int)


def _check_growing(ranks: Array, costs: Array) -> None:
    """Along every entry of the rank, in a grid of all their values."""
    sides = [len(set(column)) for column in ranks.T.tolist()]
    for axis, side in enumerate(sides):
        places = np.moveaxis(np.arange(len(ranks)).reshape(sides), axis, 0).reshape(side, -1)
        falls = np.argwhere(np.diff(costs[places], axis=0) < 0)
        if len(falls):
            (i, j) = falls[0]
            small, large = places[i, j], places[i + 1, j]
            raise ValueError(
                f"Expected a `cost` that does not fall with the rank, but rank {tuple(ranks[small].tolist())} costs "
                f"{costs[small]:g} and {tuple(ranks[large].tolist())} costs {costs[large]:g}"
            )
