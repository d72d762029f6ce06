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

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.compression import Compression, Plan, describe
from lowrank_pl.decompositions import DENSE, ZERO, Choice
from lowrank_pl.metric import Metric
from lowrank_pl.ranks import CostBudget, CostPenalty, RankProblem, enumerate_ranks
from lowrank_pl.ranks.caps import cap_of
from lowrank_pl.ranks.cost_penalty import MILLION
from lowrank_pl.structures import Dense, Structure

# Of the mean eigenvalue. What a C step leaves of a weight where inputs hardly ever lie, an L step must still pull in:
# with a millionth of it as elsewhere, some of W would stay anywhere.
SHRINKAGE = 1e-2


@dataclass(frozen=True)
class LCState:
    """What one C step hands to the next: Theta as factors, and, dense, the `anchors` of the L step at `mu`.

    An anchor is `Theta + beta / mu`: the penalty is `mu/2 ||W - anchor||^2`, and the multipliers are
    `mu (anchor - Theta)`, so that neither beta nor a dense Theta is kept as well. `scales` multiply lambda layer by
    layer. `free` are the layers without a penalty. `unchanged` counts C steps since a rank last changed. `metrics` are
    those of the norms above, for the layers that have one: they stay as they are until the next C step. None of their
    eigenvalues is above `stiffest`.
    """

    mu: float
    steps: int
    choices: dict[str, Choice]
    structures: dict[str, Structure]
    anchors: dict[str, Tensor]
    scales: dict[str, float]
    free: tuple[str, ...] = ()
    unchanged: int = 0
    metrics: dict[str, Metric] = field(default_factory=dict)
    stiffest: float = math.inf

    def beta(self, name: str) -> Tensor:
        """The multipliers of one layer, shaped as its weight."""
        return self.mu * (self.anchors[name] - self.structures[name].reconstruct())

    def knows(self, c: Compression) -> bool:
        """Whether the layer has taken part in a C step: not one that first ran, or thawed, since the last one."""
        return c.name in self.choices

    def completed(self, plan: Plan) -> tuple[dict[str, Choice], dict[str, Structure]]:
        """Choices and structures of all targets, dense for those that it does not know."""
        choices = {c.name: self.choices.get(c.name, DENSE) for c in plan.compressions}
        dense = {c.name: c.problem().structure(DENSE) for c in plan.compressions if not self.knows(c)}
        return choices, {**self.structures, **dense}

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        return {
            "mu": self.mu,
            "steps": self.steps,
            "ranks": {c.name: c.to_list(self.choices[c.name]) if self.knows(c) else None for c in plan.compressions},
            "factors": {name: list(structure.tensors) for name, structure in self.structures.items()},
            "anchors": dict(self.anchors),
            "scales": dict(self.scales),
            "free": list(self.free),
            "unchanged": self.unchanged,
            "metrics": {name: metric.state_dict() for name, metric in self.metrics.items()},
            "stiffest": self.stiffest,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], plan: Plan) -> LCState:
        """The inverse of `to_dict`, for the network that the plan is of; nothing is decomposed. Layers that it has no
        ranks of join at the next C step."""
        choices, structures, anchors, metrics = {}, {}, {}, {}
        for c in plan.compressions:
            ranks = values["ranks"].get(c.name)
            if ranks is None:
                continue
            choices[c.name] = choice = c.from_list(ranks)
            here = c.parameters[0].device
            empty = [c.read().new_empty(0)]  # before 0.2 nothing was stored for rank 0
            tensors = tuple(x.to(here) for x in values["factors"][c.name] or empty)
            if not _fits(choice, c, tensors):
                raise ValueError(
                    f"Layer {c.name!r}: the checkpoint's factors are not those of {describe(c.method)}: expected the "
                    "same network, method and targets"
                )
            structures[c.name] = Structure(choice.layout(c.layer), choice.rank, tensors)
            anchors[c.name] = values["anchors"][c.name].to(here)
            own = values.get("metrics", {}).get(c.name)  # before 0.3 there were none
            if own is not None:
                metrics[c.name] = Metric.from_state_dict(c.layer, own, here)
        numbers = {key: values[key] for key in ("mu", "steps", "unchanged")}
        numbers["stiffest"] = values.get("stiffest", math.inf)  # before 0.3 there was no bound
        return cls(
            choices=choices, structures=structures, anchors=anchors, scales=values["scales"],
            free=tuple(values["free"]), metrics=metrics, **numbers,
        )  # fmt: skip


@dataclass(frozen=True)
class CStep:
    """What one C step did. `gap` is `||W - Theta|| / ||W||` over the layers with a penalty, `penalty` the new
    `mu/2 ||W - Theta - beta/mu||^2`, `cost` the new `lambda C(r)`; `before` and `after` are the augmented Lagrangian
    apart from the training loss, which a C step does not change. All norms are those of the step's metrics."""

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
    metrics: Mapping[str, Metric] | None = None,
    stiffest: float = math.inf,
) -> tuple[LCState, CStep]:
    """Theta and the ranks that minimize `lambda C(r) + mu/2 ||W - Theta - beta/mu||^2`; then `beta -= mu (W - Theta)`
    and the anchors for an L step at `next_mu`.

    Before a layer's first one Theta and beta are 0. With `normalize` lambda is multiplied by the `||W||^2` that each
    layer has then; without `augmented` beta stays 0. Layers of `normed` (whose output goes into batch norm) get no
    penalty while their rank is 0. Weights and state are left as they are. Raises `ValueError` with the layer's name for
    weights that are not finite.

    Norms are those of `metrics`, each with A and B of mean eigenvalue 1, so that mu keeps its meaning; Frobenius norms
    without. beta is in units of weights: in a metric the multipliers of Algorithm 1 are `B beta A`. What is then above
    `stiffest` is lowered to it: the penalty is so much stiffer than in Frobenius norm, and L steps by gradient descent
    have to be stable. The first C step says how much, the others keep to that.
    """
    plan.check_finite()
    names = {c.name for c in plan.compressions}
    stiffest = stiffest if state is None else state.stiffest
    own = {n: m.normalized(SHRINKAGE).bounded(stiffest) for n, m in (metrics or {}).items() if n in names}
    known = {c.name: state if state and state.knows(c) else None for c in plan.compressions}
    problems, scales = [], dict(state.scales) if state else {}
    for c in plan.compressions:
        problem = c.problem(_shifted(c, known[c.name]), least=0, metric=own.get(c.name))
        if known[c.name] is None:
            scales[c.name] = problem.squared_norm(c.read()) if normalize else 1.0
        problems.append(replace(problem, cost_weight=scales[c.name]))
    choices, lambda_ = _choose(plan, rule, problems, state, mu)
    multiplied = next_mu if augmented else float("inf")
    steps = {
        c.name: _layer_step(
            c, rule, problem, choice, known[c.name], lambda_ / MILLION, mu, multiplied, c.name in normed
        )
        for c, problem, choice in zip(plan.compressions, problems, choices, strict=True)
    }
    changed = state is None or any(state.choices.get(name) != step.choice for name, step in steps.items())
    after = LCState(
        mu=next_mu,
        steps=state.steps + 1 if state else 1,
        choices={name: step.choice for name, step in steps.items()},
        structures={name: step.structure for name, step in steps.items()},
        anchors={name: step.anchor for name, step in steps.items()},
        scales=scales,
        free=tuple(name for name, step in steps.items() if step.free),
        unchanged=0 if changed or state is None else state.unchanged + 1,
        metrics=own,
        stiffest=stiffest,
    )
    return after, _sum_up(list(steps.values()), lambda_)


@dataclass(frozen=True)
class _LayerStep:
    """One layer's part of a C step: what it is from now on, and its terms of the augmented Lagrangian."""

    choice: Choice
    structure: Structure
    anchor: Tensor
    free: bool
    distance: float  # ||W - Theta||^2
    norm: float  # ||W||^2
    penalty: float
    cost: float
    before: float
    beta: float  # mu/2 ||beta/mu||^2, in both


def _layer_step(
    c: Compression,
    rule: CostPenalty | CostBudget,
    problem: RankProblem,
    choice: Choice,
    state: LCState | None,
    lambda_: float,
    mu: float,
    next_mu: float,
    normed: bool,
) -> _LayerStep:
    """`lambda_` is per unit of cost; an infinite `next_mu` leaves the multipliers at 0."""
    shifted, price, choice = problem.weight, lambda_ * problem.cost_weight, c.settled(choice)
    old_choice = state.choices[c.name] if state else ZERO
    old = state.structures[c.name] if state else problem.structure(ZERO)
    new = _kept(problem.structure(choice), c)
    old_theta, theta = old.reconstruct(), new.reconstruct()
    old_cost, cost = c.cost(rule.charged, old_choice), c.cost(rule.charged, choice)
    old_rest, rest = (shifted - old_theta if state else shifted), shifted - theta
    norm = problem.squared_norm
    old_error, error = norm(old_rest), norm(rest)
    before = price * old_cost + mu / 2 * old_error
    # Where the error was known beforehand only as a bound (Tucker-2), the new Theta may be worse than the old one.
    if isinstance(rule, CostBudget):
        keep = old_cost <= cost and old_error < error
    else:
        keep = before < price * cost + mu / 2 * error
    if keep:
        choice, new, theta, cost, error, rest = old_choice, old, old_theta, old_cost, old_error, old_rest
    weight, free = c.read(), normed and choice == ZERO
    shared = isinstance(new.layout, Dense) and error == 0  # then the anchor is Theta itself
    return _LayerStep(
        choice=choice,
        structure=new,
        anchor=theta if free or shared or next_mu == float("inf") else theta.add(rest, alpha=-mu / next_mu),
        free=free,
        distance=0.0 if free else norm(weight - theta) if state else error,
        norm=0.0 if free else norm(weight),
        penalty=mu / 2 * error,
        cost=price * cost,
        before=before,
        beta=mu / 2 * norm(state.anchors[c.name] - old_theta) if state else 0.0,
    )


def _sum_up(steps: Sequence[_LayerStep], lambda_: float) -> CStep:
    norm, beta = sum(step.norm for step in steps), sum(step.beta for step in steps)
    penalty, cost = sum(step.penalty for step in steps), sum(step.cost for step in steps)
    return CStep(
        gap=(sum(step.distance for step in steps) / norm) ** 0.5 if norm else 0.0,
        penalty=penalty,
        cost=cost,
        lambda_=lambda_,
        before=sum(step.before for step in steps) - beta,
        after=cost + penalty - beta,
    )


@torch.no_grad()
def add_penalty_gradients_(plan: Plan, state: LCState, only: Collection[nn.Parameter] | None = None) -> None:
    """Add `mu (W - Theta) - beta`, the gradient of the penalty, to the gradients of the targets; in a metric
    `B (mu (W - Theta) - beta) A`.

    `only` limits it to these parameters: those of one optimizer of several.
    """
    chosen = None if only is None else {id(parameter) for parameter in only}
    for c in plan.compressions:
        if c.name in state.free or not state.knows(c):
            continue
        if chosen is None or any(id(p) in chosen for p in c.parameters):
            gap, metric = c.read() - state.anchors[c.name], state.metrics.get(c.name)
            c.map.add_gradient_(state.mu * (gap if metric is None else metric.times(gap)))


def _choose(
    plan: Plan, rule: CostPenalty | CostBudget, problems: Sequence[RankProblem], state: LCState | None, mu: float
) -> tuple[list[Choice], float]:
    """The choices, and the lambda per million units of cost."""
    if isinstance(rule, CostPenalty):
        return rule(problems, mu / 2), rule.lambda_
    choices, lambda_ = rule.solve(problems, mu / 2, plan.others(plan.compressions))
    if state is None or not all(state.knows(c) for c in plan.compressions):
        return choices, lambda_

    def objective(chosen: Sequence[Choice]) -> float:
        total = 0.0
        for problem, choice in zip(problems, chosen, strict=True):
            each = enumerate_ranks(problem, rule.charged, cap_of(problem.name, rule.most))
            i = each.index(choice)
            total += lambda_ / MILLION * problem.cost_weight * each.costs[i] + mu / 2 * each.errors[i]
        return total

    # What lambda leaves of the budget is spent greedily: now and then the ranks of before did better.
    old = [state.choices[problem.name] for problem in problems]
    allowed = all(
        choice in enumerate_ranks(problem, rule.charged, cap_of(problem.name, rule.most)).choices
        for problem, choice in zip(problems, old, strict=True)
    )  # not where a resumed run has other caps
    return (old if allowed and objective(old) < objective(choices) else choices), lambda_


def _fits(choice: Choice, c: Compression, tensors: Sequence[Tensor]) -> bool:
    """Whether these can be the factors of a choice."""
    try:
        if choice.decomposition is not None:
            choice.decomposition.check_rank(c.layer, choice.rank)
    except ValueError:
        return False
    return choice.layout(c.layer).shapes() == tuple(tuple(tensor.shape) for tensor in tensors)


def _shifted(c: Compression, state: LCState | None) -> Tensor:
    """`W - beta / mu`."""
    return c.read() if state is None else c.read() - state.anchors[c.name] + state.structures[c.name].reconstruct()


def _kept(structure: Structure, c: Compression) -> Structure:
    """Not the module's own memory, which the next optimizer step writes to."""
    if any(structure.tensors[0].data_ptr() == p.data_ptr() for p in c.parameters):
        return structure.with_tensors([structure.tensors[0].clone()])
    return structure
