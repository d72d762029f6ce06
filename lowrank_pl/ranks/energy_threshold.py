"""A share of the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lowrank_pl.checks import check_number
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class EnergyThreshold(RankRule):
    """The smallest rank with `||W - W_r||_F <= (1 - p) ||W||_F`: baseline 2 of Idelbayev & Carreira-Perpinan (2020).

    Where the rank has several entries (Tucker-2), the fewest weights among the ranks whose error bound keeps to it.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("p", self.p, lambda x: 0 < x < 1, "a share in (0, 1)")

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(problem.decomposition, self._smallest(problem)) for problem in problems]

    def _smallest(self, problem: RankProblem) -> Rank:
        analysis, least = problem.analysis(problem.decomposition), problem.decomposition.least
        allowed = (1 - self.p) ** 2 * float(analysis.errors[0][0])
        if len(problem.full) == 1:
            return (max(int((analysis.errors[0] > allowed).sum()), 1),)
        # Going along the first entry, the smallest second one that is enough.
        candidates = []
        for first in range(least, problem.full[0] + 1):
            ranks = [(first, second) for second in range(least, problem.full[1] + 1) if first or second]
            enough = [error <= allowed for error in analysis.errors_at(ranks)]
            candidates += [ranks[enough.index(True)]] if any(enough) else []
        return min(candidates, key=lambda rank: (problem.num_weights(rank), rank))
