"""A share of the norm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from lowrank_pl.checks import check_number
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class EnergyThreshold(RankRule):
    """The smallest rank with `||W - W_r||_F <= (1 - p) ||W||_F`: baseline 2 of Idelbayev & Carreira-Perpinan (2020).

    Where the rank has several entries (Tucker-2, low rank + sparse), the fewest weights among the ranks whose error
    bound keeps to it; of a tensor train the smallest rank whose error bound does.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("p", self.p, lambda x: 0 < x < 1, "a share in (0, 1)")

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(problem.decomposition, self._smallest(problem)) for problem in problems]

    def _smallest(self, problem: RankProblem) -> Rank:
        decomposition, layer, analysis = problem.decomposition, problem.layer, problem.analysis(problem.decomposition)
        allowed = (1 - self.p) ** 2 * float(problem.errors[0][0])
        least, candidates = decomposition.least_rank(layer), []
        # Going along the other entries, the smallest last one that the rest of the error allows.
        for others in itertools.product(*decomposition.values(layer, max(problem.full))[:-1]):
            tails = analysis.tails(others).cpu()
            if tails[-1] <= allowed or not others:
                last = int(torch.searchsorted(-tails.contiguous(), -allowed))
                candidates.append((*others, min(max(last, least[-1]), problem.full[-1])))
        ranks = [rank for rank in candidates if decomposition.is_rank(layer, rank)]
        return min(ranks or [problem.full], key=lambda rank: (problem.num_weights(rank), rank))
