"""Energy kept over the whole network, greedily."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lowrank_pl.costs import resolve_cost
from lowrank_pl.decompositions import DENSE, Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.ranks.cost_budget import check_ratio, left_for
from lowrank_pl.ranks.enumeration import Descent, descend, total_cost


@final
@dataclass(frozen=True)
class GreedyEnergy(RankRule):
    """Maximize the product over layers of the kept energy `sum_{a <= r} sigma_a^2`, at most `ratio` of the dense cost.

    Zhang, Zou, He & Sun (TPAMI 2016), section 3.3; baseline 1 of Idelbayev & Carreira-Perpinan (CVPR 2020). The
    energies are those of the weights; Zhang et al. take PCA energies of the layers' responses. From the full ranks on,
    one singular value after another is dropped: the one that loses the least share of its layer's energy per cost
    saved. On the way down a rank costs what its factors cost, also where that is more than the dense layer; what is
    held against the budget is what will be deployed, dense layers where factors are not cheaper. The cost is that of
    all linear layers and convolutions, compressed or not. Raises `ValueError` with the least reachable ratio for a
    budget below it.
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
        layers = [descend(problem, self.cost) for problem in problems]
        dense = total_cost([problem.layer for problem in problems], self.cost)
        least = float(sum(layer.accounted[-1] for layer in layers))
        budget = left_for(dense, least, total_cost(others, self.cost), self.ratio)
        energies = [float(problem.weight.double().square().sum()) for problem in problems]
        at = [0] * len(layers)
        spent = float(sum(layer.accounted[0] for layer in layers))
        # by name where two moves lose the same
        queue = [
            (_lost_share(layer, 0, energy), problem.name, k)
            for k, (layer, energy, problem) in enumerate(zip(layers, energies, problems, strict=True))
            if len(layer.choices) > 1
        ]
        heapq.heapify(queue)
        while spent > budget and queue:
            _, name, k = heapq.heappop(queue)
            layer = layers[k]
            spent += float(layer.accounted[at[k] + 1] - layer.accounted[at[k]])
            at[k] += 1
            if at[k] + 1 < len(layer.choices):
                heapq.heappush(queue, (_lost_share(layer, at[k], energies[k]), name, k))
        return [layer.choices[i] if layer.cheaper[i] else DENSE for layer, i in zip(layers, at, strict=True)]


def _lost_share(layer: Descent, i: int, energy: float) -> float:
    """What share of its kept energy the next move of a layer loses, per cost saved."""
    kept = energy - layer.errors[i]
    lost = (layer.errors[i + 1] - layer.errors[i]) / kept if kept > 0 else 0.0
    return float(lost / (layer.costs[i] - layer.costs[i + 1]))
