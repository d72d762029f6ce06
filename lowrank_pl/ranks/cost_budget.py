"""The ranks that spend a budget best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final, get_args

from lowrank_pl.checks import check_among, check_number
from lowrank_pl.costs import Cost, Macs
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import CostRule, Others, RankProblem
from lowrank_pl.ranks.caps import Caps, cap_of, check_caps, check_patterns_of_caps
from lowrank_pl.ranks.cost_penalty import MILLION
from lowrank_pl.ranks.enumeration import enumerate_ranks, total_cost
from lowrank_pl.ranks.knapsack import fill, improve, spent

BudgetOf: TypeAlias = Literal["network", "layers"]


@final
@dataclass(frozen=True)
class CostBudget(CostRule):
    """The ranks with the least error among those with which the whole network costs at most `ratio` of the dense one.

    All that the network computes counts: layers that are not compressed (or that another rule of a mapping decides, as
    dense), and, where the cost is `"macs"`, what is in no layer at all, such as attention's products; `of="layers"` is
    a budget of linear layers and convolutions alone. The error is the sum over layers of
    `||W - W_r||_F^2 / cost_weight`, so that a `CostPenalty` with the right lambda would choose the same ranks where it
    meets the budget exactly. That lambda is found by bisection; what it leaves of the budget goes to the ranks that
    gain most by it, until no single rank can grow; and where more than a thousandth of the error could still be won,
    ranks are exchanged between layers. `most` caps ranks as in `CostPenalty`. Raises `ValueError` for a budget below
    the least reachable ratio, with that ratio and what it is made of.
    """

    cost: str | Cost = "macs"
    ratio: float = 0.5
    most: Caps = None
    of: BudgetOf = field(default="network", repr=False)  # checkpoints hold the repr, older ones without it

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_among("of", self.of, get_args(BudgetOf))
        object.__setattr__(self, "cost", self.charged)
        object.__setattr__(self, "most", check_caps(self.most))

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return self.solve(problems, error_weight, others)[0]

    def solve(
        self, problems: Sequence[RankProblem], error_weight: float, others: Sequence[LayerSpec]
    ) -> tuple[list[Choice], float]:
        """The choices, and the lambda per million units of cost that they belong to."""
        check_patterns_of_caps(problems, self.most)
        # by name, so that the order of the layers does not decide between equal choices
        order = sorted(range(len(problems)), key=lambda k: problems[k].name)
        caps = [cap_of(problems[k].name, self.most) for k in order]
        layers = [enumerate_ranks(problems[k], self.charged, cap) for k, cap in zip(order, caps, strict=True)]
        costs = [each.costs for each in layers]
        weights = [problems[k].cost_weight for k in order]
        # a layer that was all zeros at the start of learning-compression has the weight 0: it comes first then
        smallest = max(weights, default=0.0) * 1e-12 or 1.0
        weights = [max(w, smallest) for w in weights]
        dense = total_cost([problem.layer for problem in problems], self.charged)
        least = float(sum(cost[0] for cost in costs))
        budget = left_for(dense, least, others, self.charged, self.ratio, self.of)

        def at(lambda_: float) -> list[int]:
            return [each.best(lambda_ * w, error_weight) for each, w in zip(layers, weights, strict=True)]

        low, high = 0.0, 0.0
        if spent(costs, at(0.0)) > budget:
            high = 1e-30
            while spent(costs, at(high)) > budget:
                low, high = high, high * 10
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if spent(costs, at(middle)) > budget else (low, middle)
        losses = [each.errors / w for each, w in zip(layers, weights, strict=True)]
        places = fill(costs, losses, at(high), budget)
        better = improve(costs, losses, places, budget, high / error_weight)
        places = fill(costs, losses, better, budget)
        choices = {k: each.choices[i] for k, each, i in zip(order, layers, places, strict=True)}
        return [choices[k] for k in range(len(problems))], high * MILLION


def check_ratio(ratio: Any) -> None:
    """Raise `ValueError` for anything but a share in (0, 1]."""
    check_number("ratio", ratio, lambda x: 0 < x <= 1, "a share of the dense cost in (0, 1]")


def left_for(dense: float, least: float, others: Sequence[LayerSpec], cost: Cost, ratio: float, of: BudgetOf) -> float:
    """What `ratio` of the whole network's dense cost leaves to layers that cost `dense` and can cost `least`."""
    rest = others.macs if of == "network" and isinstance(others, Others) and isinstance(cost, Macs) else 0.0
    fixed = total_cost(others, cost)
    total = dense + fixed + rest
    if least + fixed + rest > ratio * total:
        beyond = f", {rest / total:.4f} what no layer covers (of='layers' leaves it out)" if rest else ""
        raise ValueError(
            f"A budget of {ratio:g} of the dense cost cannot be reached: the smallest ranks cost "
            f"{(least + fixed + rest) / total:.4f} of it; of that, {fixed / total:.4f} are layers that stay dense"
            f"{beyond}. Give a larger ratio, or compress more layers"
        )
    return max(ratio * total - fixed - rest, least)  # a difference that rounding can leave below
