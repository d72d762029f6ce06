"""A fraction of the full rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lowrank_pl.checks import check_number
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule


@final
@dataclass(frozen=True)
class RankFraction(RankRule):
    """Every entry of the full rank times `R_c`, rounded, at least 1: the `R_c` of Lee et al. (2019), section 3. A
    low-rank and a sparse part together have `R_c` times the layer's weights."""

    R_c: float

    def __post_init__(self) -> None:
        check_number("R_c", self.R_c, lambda x: 0 < x <= 1, "a fraction in (0, 1]")

    @property
    def sees_shapes_alone(self) -> bool:
        return True

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(p.decomposition, p.decomposition.at_fraction(p.layer, self.R_c)) for p in problems]
