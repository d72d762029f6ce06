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
    sparse one has its `share` of the values. A sequence gives every entry: `FixedRank((8, 500))` is rank 8 with 500
    nonzeros for `LowRankPlusSparse`, 8 input and 500 output channels for `Tucker2`."""

    r: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.r, Sequence) and not isinstance(self.r, str):
            for entry in self.r:
                check_int("r", entry, 0, "int, in every entry,")
            if not any(self.r):
                raise ValueError(f"Expected argument `r` to have an entry above 0 but got {self.r!r}")
            object.__setattr__(self, "r", tuple(self.r))
        else:
            check_int("r", self.r, 1)

    @property
    def sees_shapes_alone(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(p.decomposition, self._rank(p)) for p in problems]

    def _rank(self, problem: RankProblem) -> Rank:
        kind, layer = problem.decomposition, problem.layer
        if not isinstance(self.r, tuple):
            return kind.completed(layer, tuple(min(self.r, most) for most in kind.spectral.full_rank(layer)))
        with problem.named():
            if len(self.r) != len(problem.full):
                entries = f"{len(problem.full)} entries, as ranks of {kind!r} have"
                raise ValueError(f"Expected argument `r` with {entries}, but got {self.r}")
            rank = tuple(min(r, most) for r, most in zip(self.r, problem.full, strict=True))
            kind.check_rank(layer, rank)
        return rank

    def check(self, problem: RankProblem) -> None:
        self._rank(problem)

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        if isinstance(self.r, tuple):
            over = any(r > most for r, most in zip(self.r, problem.full, strict=True))
        else:
            over = self.r > min(problem.decomposition.spectral.full_rank(problem.layer))
        return f"rank {self.r} lowered to the full rank" if over else None
