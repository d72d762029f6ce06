"""The rank whose error is worth its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lowrank_pl.checks import check_number
from lowrank_pl.costs import Cost
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import CostRule, RankProblem
from lowrank_pl.ranks.caps import Caps, cap_of, check_caps, check_patterns_of_caps
from lowrank_pl.ranks.enumeration import enumerate_ranks

MILLION = 1e6


@final
@dataclass(frozen=True)
class CostPenalty(CostRule):
    """Per layer `argmin_r lambda C(r) + ||W - W_r||_F^2`: Idelbayev & Carreira-Perpinan (CVPR 2020), equation 5.

    lambda is per million units of cost, as in the paper: of weights (`"params"`), of multiply-adds (`"macs"`), or of
    nanoseconds (`"latency"`).

    `most` caps ranks: the R_k of their equation 1, an int for all layers or a mapping from name patterns to ints, of
    which the first that matches wins. A cap holds for every entry of a rank. A layer with a cap below its full rank may
    not stay dense: the constraint is on the rank of its weight.
    """

    lambda_: float
    cost: str | Cost = "macs"
    most: Caps = None

    def __post_init__(self) -> None:
        check_number("lambda_", self.lambda_, lambda x: x >= 0, "a number of at least 0")
        object.__setattr__(self, "cost", self.charged)
        object.__setattr__(self, "most", check_caps(self.most))

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        check_patterns_of_caps(problems, self.most)
        choices = []
        for problem in problems:
            each = enumerate_ranks(problem, self.charged, cap_of(problem.name, self.most))
            choices.append(each.choices[each.best(self.lambda_ / MILLION * problem.cost_weight, error_weight)])
        return choices
