"""ADMM on the layers of a network, for any training loop: `loss + sum lambda_1 ||A||_{2,1} + lambda_2 ||B||_*`, each
weight being `A + B`; C. Yu, Low Rank Approximation (lecture, 2021), "Unified framework". What it is for one layer is in
`lowrank_pl.linalg.admm`.

plan = make_plan(model, LowRankPlusColumns(), trace=record(model, images), training=True)
state, _ = split_step(plan, None, lambda_1=0.1, lambda_2=0.1, t=1e-2)
for _ in range(steps):
    for batch in batches:  # the step of M, which is the network's weights
        loss(batch).backward()
        add_split_gradients_(plan, state)
        optimizer.step()
    state, done = split_step(plan, state, lambda_1=0.1, lambda_2=0.1, t=1e-2, growth=1.2)
choices, structures = deployed(plan, state)
write_weights_(plan, structures)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import DENSE, ZERO, Choice, LowRankPlusColumns
from lowrank_pl.layers import lowered
from lowrank_pl.linalg import squared_norm
from lowrank_pl.linalg.admm import ADMMState, Norms, Residuals
from lowrank_pl.metric import Metric, columns_of
from lowrank_pl.structures import Structure

ROUNDS = 10  # of A and B in turn: SVDs are cheap beside the training between two steps


@final
@dataclass(frozen=True)
class Splits:
    """What one step on A and B hands to the next: every layer's state, of lowered weights `[groups, m, n]`, and its
    norms, with the lambdas in loss per unit of them. `unchanged` counts steps since a rank or a number of channels has
    changed."""

    steps: int
    layers: dict[str, ADMMState]
    norms: dict[str, Norms]
    unchanged: int = 0

    def knows(self, c: Compression) -> bool:
        """Whether the layer has taken part in a step: not one that first ran, or thawed, since the last one."""
        return c.name in self.layers

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Rank of B and number of channels of A in each group, by layer."""
        return {name: (s.rank, s.channels(self.norms[name].width).shape[1]) for name, s in self.layers.items()}

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        sizes = self.sizes()
        return {
            "steps": self.steps,
            "unchanged": self.unchanged,
            "ranks": {c.name: list(sizes[c.name]) if self.knows(c) else None for c in plan.compressions},
            "layers": {name: dict(vars(layer)) for name, layer in self.layers.items()},
            "norms": {name: dict(vars(norms)) for name, norms in self.norms.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], plan: Plan) -> Splits:
        """The inverse of `to_dict`, for the network that the plan is of. Raises `ValueError` for another one."""
        layers, norms = {}, {}
        for c in plan.compressions:
            stored = values["layers"].get(c.name)
            if stored is None:
                continue
            own = lowered(c.read(), c.layer)
            here: dict[str, Any] = {k: v.to(own.device) if isinstance(v, Tensor) else v for k, v in stored.items()}
            if here["m"].shape != own.shape:
                raise ValueError(
                    f"Layer {c.name!r}: the checkpoint's A and B are {list(here['m'].shape)}, but the layer's matrices "
                    f"are {list(own.shape)}: expected the same network and targets"
                )
            layers[c.name], norms[c.name] = ADMMState(**here), Norms(**values["norms"][c.name])
        return cls(values["steps"], layers, norms, values["unchanged"])


@final
@dataclass(frozen=True)
class SplitStep:
    """What one step did: the largest residuals of all layers (infinite at the first step), and the penalty
    `lambda_1 ||A||_{2,1} + lambda_2 ||B||_*`, summed up in loss."""

    residuals: Residuals
    penalty: float


@torch.no_grad()
def split_step(
    plan: Plan,
    state: Splits | None,
    lambda_1: float,
    lambda_2: float,
    t: float,
    growth: float = 1.0,
    balance: bool = False,
    rounds: int = ROUNDS,
) -> tuple[Splits, SplitStep]:
    """The multipliers for the weights as they are now, `Lambda + t (A + B - W)`; then A and B.

    A layer's own weight, as it is at its first step, costs `lambda_1 ||W||^2` in loss as A, `lambda_2 ||W||^2` as B:
    then channels (singular values) smaller than `lambda / t` of the mean one vanish, and no layer's weights are pulled
    at more than about the rate of a weight decay of `lambda`. t, the weight of `t/2 ||W - A - B||^2` at the first step,
    in loss, grows by `growth` from step to step, or, with `balance`, layer by layer as the residuals say. Weights and
    state are left as they are. Raises `ValueError` with the layer's name for weights that are not finite.
    """
    plan.check_finite()
    layers, norms, residuals, penalty = {}, {}, [], 0.0
    for c in plan.compressions:
        weight = lowered(c.read(), c.layer).clone(memory_format=torch.contiguous_format)
        if state is None or not state.knows(c):
            width = columns_of(c.layer) // (c.layer.in_channels // c.layer.groups)
            energy = squared_norm(c.read())
            norms[c.name] = Norms.relative(weight, width, lambda_1 * energy, lambda_2 * energy)
            moved = ADMMState.at(weight, t)
        else:
            norms[c.name] = state.norms[c.name]
            moved, found = state.layers[c.name].moved(weight)
            residuals.append(found)
            moved = moved.balanced(found) if balance else replace(moved, t=moved.t * growth)
        layers[c.name] = moved.fitted(norms[c.name], rounds)
        penalty += norms[c.name].value(layers[c.name].a, layers[c.name].b)
    largest = Residuals(*(max((getattr(r, n) for r in residuals), default=torch.inf) for n in ("primal", "dual")))
    after = Splits(1 if state is None else state.steps + 1, layers, norms)
    if state is not None and after.sizes() == state.sizes():
        after = replace(after, unchanged=state.unchanged + 1)
    return after, SplitStep(largest, penalty)


@torch.no_grad()
def add_split_gradients_(plan: Plan, state: Splits, only: Collection[nn.Parameter] | None = None) -> None:
    """Add `t (W - A - B) - Lambda` to the gradients of the targets; `only` limits it to these parameters."""
    chosen = None if only is None else {id(parameter) for parameter in only}
    for c in plan.compressions:
        if state.knows(c) and (chosen is None or any(id(p) in chosen for p in c.parameters)):
            split = state.layers[c.name]
            gap = split.t * (lowered(c.read(), c.layer) - split.anchor)
            stored = gap.mT if c.layer.kind == "conv_transpose" else gap
            c.map.add_gradient_(stored.reshape(c.layer.stored_shape))


def choices_of(plan: Plan, state: Splits) -> dict[str, Choice]:
    """The rank of B and the number of channels of A as a choice; dense for layers that have taken part in no step."""
    sizes = state.sizes()
    method = LowRankPlusColumns()
    found = {name: Choice(method, size) if any(size) else ZERO for name, size in sizes.items()}
    return {c.name: found.get(c.name, DENSE) for c in plan.compressions}


@torch.no_grad()
def deployed(
    plan: Plan, state: Splits, metrics: Mapping[str, Metric] | None = None
) -> tuple[dict[str, Choice], dict[str, Structure]]:
    """What is nearest to the weights as they are now, with A on the channels that it has and B of the rank that it has;
    the layer's own weight where that would not be cheaper."""
    choices, structures = choices_of(plan, state), {}
    for c in plan.compressions:
        problem = c.problem(metric=(metrics or {}).get(c.name))
        choice = c.settled(choices[c.name])
        if isinstance(choice.decomposition, LowRankPlusColumns):
            channels = state.layers[c.name].channels(state.norms[c.name].width)
            with problem.named():
                analysis = choice.decomposition.analyze(problem.weight, c.layer, problem.metric)
                structures[c.name] = analysis.on_channels(choice.rank, channels)
        else:
            structures[c.name] = problem.structure(choice)
    return choices, structures
