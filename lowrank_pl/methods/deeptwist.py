"""DeepTwist: Lee, Kwon, Kim & Wei, Learning Low-Rank Approximation for CNNs (2019), for any training loop.

plan = make_plan(model, method="tiled_svd", rank=CompressionRatio(2.0), training=True)
for step, batch in enumerate(batches, 1):
    train_step(batch)
    if is_due(step, last, S_D=200):
        distortion, last = distort_(plan), step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.compression import Plan, write_weights_
from lowrank_pl.decompositions import Rank, Structure


@dataclass(frozen=True)
class Distortion:
    """What one distortion did: ranks, factors by layer, and `delta_w = ||w - w~||_F^2 / N(w)` over all targets."""

    ranks: dict[str, Rank]
    structures: dict[str, Structure]
    delta_w: float


def is_due(step: int, last: int, S_D: int) -> bool:
    """Whether a distortion is due after optimizer step `step`, the last having come after step `last`."""
    return step // S_D > last // S_D


def distort_(plan: Plan, ranks: Mapping[str, Rank] | None = None) -> Distortion:
    """Replace every target weight in place by its projection; nothing is written unless all projections succeed.

    The rank rules are asked once, unless the ranks are given.
    """
    ranks = plan.choose_ranks() if ranks is None else dict(ranks)
    structures = plan.factor(ranks)
    return Distortion(ranks, structures, write_weights_(plan, structures))
