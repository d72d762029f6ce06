"""The rank that stands out of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import evb_rank
from lowrank_pl.ranks.base import RankProblem, RankRule
from lowrank_pl.structures import Rank


@final
@dataclass(frozen=True)
class EVBMF(RankRule):
    """Empirical variational Bayesian matrix factorization of the unfoldings: Nakajima et al. (JMLR 2013), analytic.

    Per entry of the rank, how many singular values stand out of the noise in the matrix that it truncates; for
    Tucker-2 as Kim et al. (ICLR 2016) choose ranks. Where a structure consists of several matrices (groups, blocks,
    tiles) their mean spectrum counts. At least 1. Beside a low-rank part a sparse one has its `share` of the values.
    Not made for CP, which truncates no matrix: the differences of its measured errors stand for a spectrum there.
    """

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        return [Choice(problem.decomposition, self._rank(problem)) for problem in problems]

    def _rank(self, problem: RankProblem) -> Rank:
        # n matrices L x M take n L (L + M) weights at full rank instead of n L M
        part, layer = problem.decomposition.spectral, problem.layer
        full, dense = part.full_rank(layer), layer.num_weights
        stored = part.layout(layer, full).num_weights
        matrices = max((stored - dense) / full[0] ** 2, 1.0) if len(full) == 1 else 1.0
        ranks = []
        for most, tails in zip(full, problem.errors[: len(full)], strict=True):
            energies = np.maximum(-np.diff(tails.cpu().numpy()), 0.0) / matrices
            ranks.append(min(max(evb_rank(energies, round(dense / matrices / most)), 1), most))
        return problem.decomposition.completed(layer, tuple(ranks))
