"""So many times fewer parameters in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import final

from lowrank_pl.checks import check_number
from lowrank_pl.decompositions import Choice, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class CompressionRatio(RankRule):
    """The largest rank with at least x times fewer weights, layer by layer; rank 1 where even that has more.

    Where the rank has several entries, they grow together, as fractions of the full rank; of a low-rank and a sparse
    part each takes its `share` of the weights.
    """

    x: float

    def __post_init__(self) -> None:
        check_number("x", self.x, lambda x: x >= 1, "a ratio of at least 1, such as 2.0,")

    @property
    def sees_shapes_alone(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(p.decomposition, _largest(p.decomposition, p.layer, self.x)) for p in problems]

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        ratio = problem.layer.num_weights / problem.num_weights(rank)
        smallest = "rank 1" if all(problem.decomposition.least_rank(problem.layer)) else f"rank {rank}"
        return f"{smallest} reaches {ratio:.2f}x only" if ratio < self.x else None


@cache
def _largest(decomposition: Decomposition, layer: LayerSpec, x: float) -> Rank:
    """Remembered, because it depends on shapes alone and is asked for at every distortion."""
    return decomposition.within(layer, layer.num_weights / x)
