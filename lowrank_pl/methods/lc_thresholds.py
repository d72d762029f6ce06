"""From which mu and which lambda on a C step of learning-compression gives anything but rank 0, or but dense layers."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_pl.compression import Plan
from lowrank_pl.methods.learning_compression import LCState
from lowrank_pl.metric import Metric
from lowrank_pl.ranks import CostPenalty, enumerate_ranks
from lowrank_pl.ranks.caps import cap_of
from lowrank_pl.ranks.cost_penalty import MILLION


def least_mu(
    plan: Plan, rule: CostPenalty, scales: Mapping[str, float], metrics: Mapping[str, Metric] | None = None
) -> tuple[float, float]:
    """Above which mu the first C step leaves at least one layer, and every layer, with a rank above 0; `scales` and
    `metrics` are those of the state after it."""
    thresholds = []
    for c in plan.compressions:
        problem = c.problem(cost_weight=scales[c.name], least=0, metric=(metrics or {}).get(c.name))
        choices = enumerate_ranks(problem, rule.charged, cap_of(c.name, rule.most))
        saved = choices.errors[0] - choices.errors[1:]
        price = rule.lambda_ / MILLION * scales[c.name]
        worth = [2 * price * cost / s for cost, s in zip(choices.costs[1:], saved, strict=True) if s > 0]
        thresholds += [min(worth)] if worth else []
    return min(thresholds, default=0.0), max(thresholds, default=0.0)


def least_lambda(plan: Plan, rule: CostPenalty, state: LCState, mu: float) -> float:
    """The lambda, per million units of cost, above which the C step at `mu` that left every layer dense (`state`, right
    after it) leaves at least one otherwise; infinite if no rank is cheaper than dense.

    `lambda scale C(r) + mu/2 e(r) < lambda scale C(dense)`, solved for lambda at every rank.
    """
    worth = []
    for c in plan.compressions:
        weight, scale = state.structures[c.name].reconstruct(), state.scales[c.name]
        problem = c.problem(weight, scale, least=0, metric=state.metrics.get(c.name))
        choices = enumerate_ranks(problem, rule.charged, cap_of(c.name, rule.most))
        saved = scale / MILLION * (choices.costs.max() - choices.costs)
        worth += [mu / 2 * error / s for error, s in zip(choices.errors, saved, strict=True) if s > 0]
    return float(min(worth, default=float("inf")))
