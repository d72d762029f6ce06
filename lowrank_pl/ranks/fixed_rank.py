"""The same rank everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lowrank_pl.checks import check_int
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class FixedRank(RankRule):
    """Every entry of the rank is r, or the layer's full rank where that is smaller. Beside a low-rank part of rank r a
    sparse one has its `share` of the values."""

    r: int

    def __post_init__(self) -> None:
        check_int("r", self.r, 1)

    @property
    def sees_shapes_alone(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(p.decomposition, self._rank(p)) for p in problems]

    def _rank(self, problem: RankProblem) -> Rank:
        ranks = problem.decomposition.spectral.full_rank(problem.layer)
        return problem.decomposition.completed(problem.layer, tuple(min(self.r, most) for most in ranks))

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        ranks = problem.decomposition.spectral.full_rank(problem.layer)
        return f"rank {self.r} lowered to the full rank" if self.r > min(ranks) else None
