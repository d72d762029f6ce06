"""The ranks that spend a budget best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lowrank_pl.costs import resolve_cost
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.ranks.cost_penalty import MILLION
from lowrank_pl.ranks.enumeration import Enumeration, enumerate_ranks, total_cost


@final
@dataclass(frozen=True)
class CostBudget(RankRule):
    """`CostPenalty` with the lambda at which the whole network costs at most `ratio` of the dense one.

    All linear layers and convolutions count, also those that are not compressed (or that another rule of a mapping
    decides, as dense). lambda is found by bisection; what it leaves of the budget goes to the ranks that gain most by
    it, until no single rank can grow. Raises `ValueError` with the least reachable ratio for a budget below it.
    """

    cost: Any = "macs"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        object.__setattr__(self, "cost", resolve_cost(self.cost))

    @property
    def compares(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return self.solve(problems, error_weight, others)[0]

    def solve(
        self, problems: Sequence[RankProblem], error_weight: float, others: Sequence[LayerSpec]
    ) -> tuple[list[Choice], float]:
        """The choices, and the lambda per million units of cost that they belong to."""
        layers = [enumerate_ranks(problem, self.cost) for problem in problems]
        weights = [problem.cost_weight for problem in problems]
        dense, least = (float(sum(each.costs[i] for each in layers)) for i in (-1, 0))
        budget = left_for(dense, least, total_cost(others, self.cost), self.ratio)

        def at(lambda_: float) -> list[int]:
            return [each.best(lambda_ * w, error_weight) for each, w in zip(layers, weights, strict=True)]

        low, high = 0.0, 0.0
        if _spent(layers, at(0.0)) > budget:
            high = 1e-30
            while _spent(layers, at(high)) > budget:
                low, high = high, high * 10
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if _spent(layers, at(middle)) > budget else (low, middle)
        places = _spend_the_rest([p.name for p in problems], layers, weights, at(high), budget)
        return [each.choices[i] for each, i in zip(layers, places, strict=True)], high * MILLION


def check_ratio(ratio: Any) -> None:
    """Raise `ValueError` for anything but a share in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"Expected argument `ratio` to be a share of the dense cost in (0, 1] but got {ratio!r}")


def left_for(dense: float, least: float, others: float, ratio: float) -> float:
    """What `ratio` of the whole network's dense cost leaves to layers that cost `dense` and can cost `least`, while the
    others cost `others`."""
    total = dense + others
    if least + others > ratio * total:
        raise ValueError(
            f"A budget of {ratio:g} of the dense cost cannot be reached: the smallest ranks cost "
            f"{(least + others) / total:.4f} of it. Ask for more, or compress more layers"
        )
    return ratio * total - others


def _spent(layers: Sequence[Enumeration], places: Sequence[int]) -> float:
    return float(sum(each.costs[i] for each, i in zip(layers, places, strict=True)))


def _spend_the_rest(
    names: Sequence[str], layers: Sequence[Enumeration], weights: Sequence[float], places: Sequence[int], budget: float
) -> list[int]:
    """Raise one rank after another, the one with the most error saved per cost first, while one can be raised."""
    chosen = list(places)
    while True:
        rest = budget - _spent(layers, chosen)
        moves = []
        for k, (each, weight) in enumerate(zip(layers, weights, strict=True)):
            here = chosen[k]
            saved, more = each.errors[here] - each.errors, each.costs - each.costs[here]
            possible = np.flatnonzero((more > 0) & (more <= rest) & (saved > 0))
            if len(possible):
                gains = saved[possible] / more[possible] / weight
                moves.append((float(gains.max()), names[k], k, int(possible[gains.argmax()])))
        if not moves:
            return chosen
        *_, k, place = max(moves)
        chosen[k] = place
