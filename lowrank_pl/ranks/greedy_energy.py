"""Energy kept over the whole network, greedily."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lowrank_pl.costs import resolve_cost
from lowrank_pl.decompositions import Rank
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.ranks.cost_budget import check_ratio, left_for
from lowrank_pl.ranks.enumeration import Enumeration, enumerate_ranks, total_cost


@final
@dataclass(frozen=True)
class GreedyEnergy(RankRule):
    """Maximize the product over layers of the kept energy `sum_{a <= r} sigma_a^2`, at most `ratio` of the dense cost.

    Zhang, Zou, He & Sun (TPAMI 2016), section 3.3; baseline 1 of Idelbayev & Carreira-Perpinan (CVPR 2020). From the
    dense network on, one singular value after another is dropped: the one that loses the least share of its layer's
    energy per cost saved. The cost is that of all linear layers and convolutions, compressed or not. Raises
    `ValueError` with the least reachable ratio for a budget below it.
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
    ) -> list[Rank]:
        layers = [enumerate_ranks(problem, self.cost) for problem in problems]
        budget = left_for(layers, self.ratio, total_cost(others, self.cost))
        paths = [_frontier(layer) for layer in layers]  # places in the enumeration, cheapest first
        at = [len(path) - 1 for path in paths]
        energies = [float(problem.weight.double().square().sum()) for problem in problems]
        spent = sum(float(layer.costs[-1]) for layer in layers)
        queue: list[tuple[float, str, int]] = []  # by name where two lose the same

        def offer(k: int) -> None:
            """The next move of layer k: what share of its energy it loses per cost saved."""
            if at[k] > 0:
                here, there = paths[k][at[k]], paths[k][at[k] - 1]
                kept = energies[k] - layers[k].errors[here]
                lost = (layers[k].errors[there] - layers[k].errors[here]) / kept if kept > 0 else 0.0
                share = float(lost / (layers[k].costs[here] - layers[k].costs[there]))
                heapq.heappush(queue, (share, problems[k].name, k))

        for k in range(len(layers)):
            offer(k)
        while spent > budget and queue:
            *_, k = heapq.heappop(queue)
            spent -= float(layers[k].costs[paths[k][at[k]]] - layers[k].costs[paths[k][at[k] - 1]])
            at[k] -= 1
            offer(k)
        return [layer.ranks[path[i]] for layer, path, i in zip(layers, paths, at, strict=True)]


def _frontier(layer: Enumeration) -> list[int]:
    """The ranks that nothing cheaper approximates as well, by growing cost and falling error."""
    path = [0]
    for i in range(1, len(layer.ranks)):
        if layer.costs[i] > layer.costs[path[-1]] and layer.errors[i] < layer.errors[path[-1]]:
            path.append(i)
        elif layer.costs[i] == layer.costs[path[-1]] and layer.errors[i] < layer.errors[path[-1]]:
            path[-1] = i
    return path
