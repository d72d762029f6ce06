"""The rank whose error is worth its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lowrank_pl.costs import resolve_cost
from lowrank_pl.decompositions import Rank
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.ranks.caps import capped, check_caps
from lowrank_pl.ranks.enumeration import enumerate_ranks

MILLION = 1e6


@final
@dataclass(frozen=True)
class CostPenalty(RankRule):
    """Per layer `argmin_r lambda C(r) + ||W - W_r||_F^2`: Idelbayev & Carreira-Perpinan (CVPR 2020), equation 5.

    lambda is per million units of cost, as in the paper: of weights (`"params"`), of multiply-adds (`"macs"`), or of
    nanoseconds (`"latency"`).

    `most` caps ranks: the R_k of their equation 1, an int for all layers or a mapping from name patterns to ints, of
    which the first that matches wins. A cap holds for every entry of a rank. A layer with a cap below its full rank may
    not stay dense: the constraint is on the rank of its weight.
    """

    lambda_: float
    cost: Any = "macs"
    most: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.lambda_, bool) or not isinstance(self.lambda_, (int, float)) or not self.lambda_ >= 0:
            raise ValueError(f"Expected argument `lambda_` to be a number of at least 0 but got {self.lambda_!r}")
        object.__setattr__(self, "cost", resolve_cost(self.cost))
        object.__setattr__(self, "most", check_caps(self.most))

    @property
    def compares(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Rank]:
        ranks = []
        for problem in capped(problems, self.most):
            choices = enumerate_ranks(problem, self.cost)
            ranks.append(choices.ranks[choices.best(self.lambda_ / MILLION * problem.cost_weight, error_weight)])
        return ranks
