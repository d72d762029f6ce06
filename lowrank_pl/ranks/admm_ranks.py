"""The rank and the channels that convex penalties leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.checks import check_number
from lowrank_pl.decompositions import Choice, LowRankPlusColumns
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import lowered
from lowrank_pl.linalg.admm import LinearResponse, Norms, solve
from lowrank_pl.metric import columns_of, lowered_roots
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class ADMMRanks(RankRule):
    """How many input channels A has, and the rank of B, in `min E||(W - A - B) x||^2 / E||W x||^2 +
    lambda_1 ||A||_{2,1} / ||W||_{2,1} + lambda_2 ||B||_* / ||W||_*`, layer by layer: C. Yu (lecture, 2021).

    All three are shares: keeping all of W in A costs `lambda_1`, in B `lambda_2`, and losing it costs 1. For
    `LowRankPlusColumns`, whose factors are then fitted without the penalties; its inputs x are those of the metric, or
    all alike. Of every other structure each entry of the rank counts the singular values that stay above
    `lambda_2 ||W||^2 / (2 sum of singular values)`, which is the same without A. At least 1.
    """

    lambda_1: float
    lambda_2: float

    def __post_init__(self) -> None:
        for name in ("lambda_1", "lambda_2"):
            check_number(name, getattr(self, name), lambda x: 0 < x < float("inf"), "a number above 0")

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(p.decomposition, self._split(p) if _has_columns(p) else self._kept(p)) for p in problems]

    def _split(self, problem: RankProblem) -> Rank:
        layer, root = problem.layer, None if problem.metric is None else lowered_roots(problem.metric)[1]
        weight: Tensor = lowered(problem.weight, layer).double()
        width = columns_of(layer) // (layer.in_channels // layer.groups)
        root = None if root is None else root.to(weight.device)
        with problem.named():
            norms = Norms.relative(weight, width, self.lambda_1, self.lambda_2)
            state, _ = solve(LinearResponse.of(weight, root), weight, norms)
        found = state.rank, state.channels(width).shape[1]
        return found if any(found) else (1, 0)

    def _kept(self, problem: RankProblem) -> Rank:
        ranks = []
        for tails in problem.errors:
            values = (tails[:-1] - tails[1:]).clamp(min=0).sqrt()
            least = self.lambda_2 * float(tails[0]) / 2 / max(float(values.sum()), 1e-300)
            ranks.append(max(int((values > least).sum()), 1))
        return tuple(ranks)


def _has_columns(problem: RankProblem) -> bool:
    return isinstance(problem.decomposition, LowRankPlusColumns)
