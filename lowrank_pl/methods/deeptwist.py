"""DeepTwist: Lee, Kwon, Kim & Wei, Learning Low-Rank Approximation for CNNs (2019), for any training loop.

plan, last, choices = make_plan(model, method="tiled_svd", rank=CompressionRatio(2.0), training=True), 0, None
for step, batch in enumerate(batches, 1):
    train_step(batch)
    if is_due(step, last, S_D=200):
        choices, last = distort_(plan, choices).choices, step  # chosen at the first distortion, kept from then on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.compression import Plan, write_weights_
from lowrank_pl.decompositions import Choice
from lowrank_pl.metric import Metric
from lowrank_pl.ranks import RankProblem
from lowrank_pl.structures import Structure


@dataclass(frozen=True)
class Distortion:
    """What one distortion did: choices and factors by layer, `delta_w = ||w - w~||_F^2 / N(w)` over all targets."""

    choices: dict[str, Choice]
    structures: dict[str, Structure]
    delta_w: float


def is_due(step: int, last: int, S_D: int) -> bool:
    """Whether a distortion is due after optimizer step `step`, the last having come after step `last`."""
    return step // S_D > last // S_D


def distort_(
    plan: Plan,
    choices: Mapping[str, Choice] | None = None,
    problems: Mapping[str, RankProblem] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Distortion:
    """Replace every target weight in place by its projection; nothing is written unless all projections succeed.

    Without choices the rank rules are asked. They must be asked once only: of weights that were projected before, a
    rule that looks at spectra chooses smaller and smaller ranks. `problems` are those that the choices were made from,
    if they were made just now. With `metrics` they are nearest, and spectra are, in the sense of these.
    """
    problems = plan.problems(metrics) if problems is None else problems
    choices = plan.choose_ranks(problems) if choices is None else dict(choices)
    structures = plan.factor(choices, problems)
    return Distortion(choices, structures, write_weights_(plan, structures))
