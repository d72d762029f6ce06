"""Ranks that the hardware likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lowrank_pl.choices import resolve
from lowrank_pl.decompositions import Cheapest, Rank, chosen
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule


@final
@dataclass(frozen=True)
class MultipleOf(RankRule):
    """Another rule's ranks, rounded down to multiples of m: at least m, at most the full rank.

    Full ranks, which stand for dense layers, and 0 stay. What the other rule promises about cost holds but where a rank
    below m becomes m.
    """

    rule: Any
    m: int = 8

    def __post_init__(self) -> None:
        if type(self.m) is not int or self.m < 1:
            raise ValueError(f"Expected argument `m` to be an int of at least 1 but got {self.m!r}")
        rules = resolve(self.rule, RankRule, "rule")  # type: ignore[type-abstract]
        object.__setattr__(self, "rule", rules["*"])

    @property
    def compares(self) -> bool:
        return self.rule.compares

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Rank]:
        ranks = self.rule(problems, error_weight, others)
        return [self._rounded(problem, rank) for problem, rank in zip(problems, ranks, strict=True)]

    def _rounded(self, problem: RankProblem, rank: Rank) -> Rank:
        if rank == problem.full or not any(rank):
            return rank
        decomposition, own = chosen(problem.decomposition, rank)
        full = decomposition.full_rank(problem.layer)
        multiples = (min(max(r // self.m * self.m, self.m), most) for r, most in zip(own, full, strict=True))
        return (*(rank[:1] if isinstance(problem.decomposition, Cheapest) else ()), *multiples)

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        return self.rule.note(problem, rank)
