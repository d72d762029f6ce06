"""Ranks that the hardware likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lowrank_pl.checks import check_int
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.names import resolve
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class MultipleOf(RankRule):
    """Another rule's ranks, rounded down to multiples of m: at least m, at most the full rank.

    Full ranks, which stand for dense layers, and 0, in any entry, stay. What the other rule promises about cost holds
    but where a rank below m becomes m.
    """

    rule: str | RankRule
    m: int = 8

    def __post_init__(self) -> None:
        check_int("m", self.m, 1)
        object.__setattr__(self, "rule", self._inner)

    @property
    def _inner(self) -> RankRule:
        return resolve(self.rule, RankRule, "rule")["*"]  # type: ignore[type-abstract]

    @property
    def compares(self) -> bool:
        return self._inner.compares

    @property
    def weighs_macs(self) -> bool:
        return self._inner.weighs_macs

    @property
    def sees_shapes_alone(self) -> bool:
        return self._inner.sees_shapes_alone

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        choices = self._inner(problems, error_weight, others)
        return [self._rounded(problem, choice) for problem, choice in zip(problems, choices, strict=True)]

    def _rounded(self, problem: RankProblem, choice: Choice) -> Choice:
        if choice.decomposition is None:
            return choice
        full = choice.decomposition.full_rank(problem.layer)
        if choice.rank == full:
            return choice
        multiples = (
            min(max(r // self.m * self.m, self.m), most) if r else 0 for r, most in zip(choice.rank, full, strict=True)
        )
        return Choice(choice.decomposition, tuple(multiples))

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        return self._inner.note(problem, rank)
