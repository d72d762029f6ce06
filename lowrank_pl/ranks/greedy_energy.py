"""Energy kept over the whole network, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final, get_args

import numpy as np

from lowrank_pl.checks import check_among
from lowrank_pl.costs import Cost
from lowrank_pl.decompositions import DENSE, Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import CostRule, RankProblem
from lowrank_pl.ranks.cost_budget import BudgetOf, check_ratio, left_for
from lowrank_pl.ranks.enumeration import descend, enumerate_ranks, total_cost
from lowrank_pl.ranks.knapsack import fill, spent

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@final
@dataclass(frozen=True)
class GreedyEnergy(CostRule):
    """Maximize the product over layers of the kept energy `sum_{a <= r} sigma_a^2`, at most `ratio` of the dense cost.

    Zhang, Zou, He & Sun (TPAMI 2016), section 3.3; baseline 1 of Idelbayev & Carreira-Perpinan (CVPR 2020). The
    energies are those of the weights; Zhang et al. take PCA energies of the layers' responses. From the full ranks on,
    one singular value after another is dropped: the one by which the logarithm of the product falls least per cost
    saved. On the way down a rank costs what its factors cost, also where that is more than the dense layer; what is
    held against the budget is what will be deployed, dense layers where factors are not cheaper. What the last move
    leaves of the budget goes to the ranks that gain most by it, until no single rank can grow. The cost is that of the
    whole network, or of its linear layers and convolutions, as for `CostBudget`, and so is what is raised.
    """

    cost: str | Cost = "macs"
    ratio: float = 0.5
    of: BudgetOf = field(default="network", repr=False)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_among("of", self.of, get_args(BudgetOf))
        object.__setattr__(self, "cost", self.charged)

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        # by name where two moves lose the same
        order = sorted(range(len(problems)), key=lambda k: problems[k].name)
        layers = [descend(problems[k], self.charged) for k in order]
        dense = total_cost([problem.layer for problem in problems], self.charged)
        least = float(sum(layer.accounted[-1] for layer in layers))
        budget = left_for(dense, least, others, self.charged, self.ratio, self.of)
        energies = [problems[k].squared_norm(problems[k].weight) for k in order]
        paths = [
            _path(layer.costs, _lost(layer.errors, energy)) for layer, energy in zip(layers, energies, strict=True)
        ]
        moves = sorted((share, k, i) for k, path in enumerate(paths) for share, i in path)
        at = [0] * len(layers)
        costs = [layer.accounted for layer in layers]
        for _, k, i in moves:
            if spent(costs, at) <= budget:
                break
            at[k] = i
        reached = [each.choices[i] if each.cheaper[i] else DENSE for each, i in zip(layers, at, strict=True)]
        deployed = [enumerate_ranks(problems[k], self.charged) for k in order]
        places = fill(
            [each.costs for each in deployed],
            [_lost(each.errors, energy) for each, energy in zip(deployed, energies, strict=True)],
            [each.index(choice) for each, choice in zip(deployed, reached, strict=True)],
            budget,
        )
        found = {k: each.choices[i] for k, each, i in zip(order, deployed, places, strict=True)}
        return [found[k] for k in range(len(problems))]


def _lost(errors: Array, energy: float) -> Array:
    """`-log` of the share of its energy that a layer keeps, per error. Where a bound of the error (Tucker-2) leaves
    nothing, a share of 1e-9."""
    return -np.log(np.maximum(1 - errors / energy, 1e-9)) if energy > 0 else np.zeros(len(errors))


def _path(costs: Array, lost: Array) -> list[tuple[float, int]]:
    """A layer's moves downwards: what each loses per cost saved, growing, and to which place.

    Always the cheaper rank with the least loss per cost saved: the one below, where the rank has one entry. Where it
    has several, and where structures are mixed, the next cheaper one may be far worse than others further down.
    """
    moves, i, share = [], 0, 0.0
    while i + 1 < len(costs):
        shares = (lost[i + 1 :] - lost[i]) / (costs[i] - costs[i + 1 :])
        share = max(share, float(shares.min()))  # which rounding alone could let fall
        i += 1 + int(len(shares) - 1 - shares[::-1].argmin())  # the furthest of several
        moves.append((share, i))
    return moves
