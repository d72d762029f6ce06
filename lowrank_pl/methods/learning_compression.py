"""Learning-compression (LC): Idelbayev & Carreira-Perpinan, Low-rank Compression of Neural Nets (CVPR 2020), Algorithm
1, for any training loop.

rule = CostPenalty(lambda_, "macs")
plan = make_plan(model, "svd", rule, trace=record(model, images), training=True)
state, _ = c_step(plan, rule, None, mu=mus[0], next_mu=mus[1])
for mu, next_mu in pairwise([*mus[1:], mus[-1]]):
    for batch in batches:  # L step
        loss(batch).backward()
        add_penalty_gradients_(plan, state)
        optimizer.step()
    state, _ = c_step(plan, rule, state, mu, next_mu)
write_weights_(plan, state.structures)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import Constant, Dense, Rank, Structure
from lowrank_pl.linalg import shared_decompositions, squared_norm
from lowrank_pl.ranks import CostBudget, CostPenalty, RankProblem, enumerate_ranks
from lowrank_pl.ranks.cost_penalty import MILLION

T = TypeVar("T")


@dataclass(frozen=True)
class LCState:
    """What one C step hands to the next: Theta as factors, and, dense, the `anchors` of the L step at `mu`.

    An anchor is `Theta + beta / mu`: the penalty is `mu/2 ||W - anchor||^2`, and the multipliers are
    `mu (anchor - Theta)`, so that neither beta nor a dense Theta is kept as well. `scales` multiply lambda layer by
    layer. `free` are the layers without a penalty. `unchanged` counts C steps since a rank last changed.
    """

    mu: float
    steps: int
    structures: dict[str, Structure]
    anchors: dict[str, Tensor]
    scales: dict[str, float]
    free: tuple[str, ...] = ()
    unchanged: int = 0

    @property
    def ranks(self) -> dict[str, Rank]:
        return {name: structure.rank for name, structure in self.structures.items()}

    def beta(self, name: str) -> Tensor:
        """The multipliers of one layer, shaped as its weight."""
        return self.mu * (self.anchors[name] - self.structures[name].reconstruct())

    def to_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        return {
            "mu": self.mu,
            "steps": self.steps,
            "ranks": {name: list(rank) for name, rank in self.ranks.items()},
            "factors": {name: structure.tensors() for name, structure in self.structures.items()},
            "anchors": dict(self.anchors),
            "scales": dict(self.scales),
            "free": list(self.free),
            "unchanged": self.unchanged,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], plan: Plan) -> LCState:
        """The inverse of `to_dict`, for the network that the plan is of."""
        structures, anchors = {}, {}
        for c in plan.compressions:
            if c.name not in values["ranks"]:
                raise ValueError(
                    f"Layer {c.name!r} takes part now but did not when the checkpoint was written: expected the same "
                    "network, method and targets"
                )
            # The shapes of this rank's factors, to be filled with the stored numbers
            empty = c.factor(torch.zeros_like(c.weight), tuple(values["ranks"][c.name]))
            structures[c.name] = empty.with_tensors([x.to(c.weight.device) for x in values["factors"][c.name]])
            anchors[c.name] = values["anchors"][c.name].to(c.weight.device)
        numbers = {key: values[key] for key in ("mu", "steps", "unchanged")}
        return cls(
            structures=structures, anchors=anchors, scales=values["scales"], free=tuple(values["free"]), **numbers
        )


@dataclass(frozen=True)
class CStep:
    """What one C step did. `gap` is `||W - Theta|| / ||W||` over the layers with a penalty, `penalty` the new
    `mu/2 ||W - Theta - beta/mu||^2`, `cost` the new `lambda C(r)`; `before` and `after` are the augmented Lagrangian
    apart from the training loss, which a C step does not change."""

    gap: float
    penalty: float
    cost: float
    lambda_: float
    before: float
    after: float


@torch.no_grad()
def c_step(
    plan: Plan,
    rule: CostPenalty | CostBudget,
    state: LCState | None,
    mu: float,
    next_mu: float,
    normalize: bool = True,
    augmented: bool = True,
    normed: Collection[str] = (),
) -> tuple[LCState, CStep]:
    """Theta and the ranks that minimize `lambda C(r) + mu/2 ||W - Theta - beta/mu||^2`; then `beta -= mu (W - Theta)`
    and the anchors for an L step at `next_mu`.

    Before the first one (`state` None) Theta and beta are 0. With `normalize` lambda is multiplied by the `||W||^2`
    that each layer has then; without `augmented` beta stays 0. Layers of `normed` (whose output goes into batch norm)
    get no penalty while their rank is 0. Weights and state are left as they are. With several processes, the first one
    chooses. Raises `ValueError` with the layer's name for weights that are not finite.
    """
    plan.check_finite()
    with shared_decompositions():
        return _c_step(plan, rule, state, mu, next_mu, normalize, augmented, normed)


def _c_step(
    plan: Plan,
    rule: CostPenalty | CostBudget,
    state: LCState | None,
    mu: float,
    next_mu: float,
    normalize: bool,
    augmented: bool,
    normed: Collection[str],
) -> tuple[LCState, CStep]:
    scales = (
        state.scales if state else {c.name: squared_norm(c.weight) if normalize else 1.0 for c in plan.compressions}
    )
    problems = [
        RankProblem(c.name, c.layer, c.decomposition, _shifted(c, state), scales[c.name], least=0)
        for c in plan.compressions
    ]
    ranks, lambda_ = _from_first_process(_choose(plan, rule, problems, state, mu))
    structures: dict[str, Structure] = {}
    anchors: dict[str, Tensor] = {}
    free = []
    sums = dict.fromkeys(("gap", "norm", "penalty", "cost", "before", "beta"), 0.0)
    for c, problem, rank in zip(plan.compressions, problems, ranks, strict=True):
        shifted, price = problem.weight, lambda_ / MILLION * scales[c.name]
        old = state.structures[c.name] if state else Constant(c.layer, (0,) * len(problem.full), c.weight)
        new = _same_everywhere(_kept(c.factor(shifted, rank), c))
        old_theta, theta = old.reconstruct(), new.reconstruct()
        old_cost, cost = (c.cost(rule.cost, structure.rank) for structure in (old, new))
        old_rest, rest = (shifted - old_theta if state else shifted), shifted - theta
        old_error, error = squared_norm(old_rest), squared_norm(rest)
        sums["before"] += price * old_cost + mu / 2 * old_error
        sums["beta"] += mu / 2 * (squared_norm(state.anchors[c.name] - old_theta) if state else 0.0)
        # Where the error was known beforehand only as a bound (Tucker-2), the new Theta may be worse than the old one.
        if isinstance(rule, CostBudget):
            keep = old_cost <= cost and old_error < error
        else:
            keep = price * old_cost + mu / 2 * old_error < price * cost + mu / 2 * error
        if keep:
            new, theta, cost, error, rest = old, old_theta, old_cost, old_error, old_rest
        structures[c.name] = new
        sums["cost"] += price * cost
        sums["penalty"] += mu / 2 * error
        if c.name in normed and not any(new.rank):
            free.append(c.name)
            anchors[c.name] = theta
            continue
        sums["gap"] += squared_norm(c.weight - theta) if state else error
        sums["norm"] += squared_norm(c.weight)
        shared = isinstance(new, Dense) and error == 0  # then the anchor is Theta itself
        anchors[c.name] = theta if shared or not augmented else theta.add(rest, alpha=-mu / next_mu)
    changed = state is None or any(state.ranks[name] != structure.rank for name, structure in structures.items())
    after = LCState(
        mu=next_mu,
        steps=state.steps + 1 if state else 1,
        structures=structures,
        anchors=anchors,
        scales=scales,
        free=tuple(free),
        unchanged=0 if changed or state is None else state.unchanged + 1,
    )
    return after, CStep(
        gap=(sums["gap"] / sums["norm"]) ** 0.5 if sums["norm"] else 0.0,
        penalty=sums["penalty"],
        cost=sums["cost"],
        lambda_=lambda_,
        before=sums["before"] - sums["beta"],
        after=sums["cost"] + sums["penalty"] - sums["beta"],
    )


@torch.no_grad()
def add_penalty_gradients_(plan: Plan, state: LCState, only: Collection[nn.Parameter] | None = None) -> None:
    """Add `mu (W - Theta) - beta`, the gradient of the penalty, to the gradients of the targets.

    `only` limits it to these parameters: those of one optimizer of several.
    """
    chosen = None if only is None else {id(parameter) for parameter in only}
    for c in plan.compressions:
        weight = c.parameter
        if c.name in state.free or (chosen is not None and id(weight) not in chosen):
            continue
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.add_(weight, alpha=state.mu).sub_(state.anchors[c.name], alpha=state.mu)


def least_mu(
    plan: Plan, rule: CostPenalty, scales: Mapping[str, float], normed: Collection[str] = ()
) -> tuple[float, float]:
    """Above which mu the first C step leaves at least one layer, and every layer, with a rank above 0."""
    thresholds = []
    for c in plan.compressions:
        problem = RankProblem(c.name, c.layer, c.decomposition, c.weight, scales[c.name], least=0)
        choices = enumerate_ranks(problem, rule.cost)
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
        problem = RankProblem(c.name, c.layer, c.decomposition, weight, scale, least=0)
        choices = enumerate_ranks(problem, rule.cost)
        saved = scale / MILLION * (choices.costs.max() - choices.costs)
        worth += [mu / 2 * error / s for error, s in zip(choices.errors, saved, strict=True) if s > 0]
    return float(min(worth, default=float("inf")))


def _choose(
    plan: Plan, rule: CostPenalty | CostBudget, problems: Sequence[RankProblem], state: LCState | None, mu: float
) -> tuple[list[Rank], float]:
    """The ranks, and the lambda per million units of cost."""
    if isinstance(rule, CostPenalty):
        return rule(problems, mu / 2), rule.lambda_
    ranks, lambda_ = rule.solve(problems, mu / 2, plan.others(plan.compressions))
    if state is None:
        return ranks, lambda_

    def objective(chosen: Sequence[Rank]) -> float:
        total = 0.0
        for problem, rank in zip(problems, chosen, strict=True):
            choices = enumerate_ranks(problem, rule.cost)
            i = choices.index(rank)
            total += lambda_ / MILLION * problem.cost_weight * choices.costs[i] + mu / 2 * choices.errors[i]
        return total

    # What lambda leaves of the budget is spent greedily: now and then the ranks of before did better.
    old = [state.structures[problem.name].rank for problem in problems]
    return (old if objective(old) < objective(ranks) else ranks), lambda_


def _shifted(c: Compression, state: LCState | None) -> Tensor:
    """`W - beta / mu`."""
    return c.weight if state is None else c.weight - state.anchors[c.name] + state.structures[c.name].reconstruct()


def _kept(structure: Structure, c: Compression) -> Structure:
    """Not the module's own memory, which the next optimizer step writes to."""
    if isinstance(structure, Dense) and structure.weight.data_ptr() == c.weight.data_ptr():
        return structure.with_tensors([structure.weight.clone()])
    return structure


def _from_first_process(value: T) -> T:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _same_everywhere(structure: Structure) -> Structure:
    """The first process's factors: the last bits of a decomposition differ between machines."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return structure
    tensors = [tensor.contiguous() for tensor in structure.tensors()]
    for tensor in tensors:
        torch.distributed.broadcast(tensor, src=0)
    return structure.with_tensors(tensors)
