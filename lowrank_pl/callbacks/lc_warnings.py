"""What may be wrong with a learning-compression, said before it costs anybody an afternoon."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BaseFinetuning
from torch.optim import LBFGS, SGD

from lowrank_pl.callbacks.learning_rate import stability
from lowrank_pl.compression import Plan
from lowrank_pl.costs import Cost, Latency, Macs, Params
from lowrank_pl.decompositions import DENSE, ZERO
from lowrank_pl.methods import LCState, least_lambda, least_mu
from lowrank_pl.ranks import CostBudget, CostPenalty
from lowrank_pl.ranks.cost_penalty import MILLION

FAR = 0.1  # a gap that is no rounding


def check_targets(trainer: pl.Trainer, plan: Plan) -> None:
    """Raise `ValueError` for targets that are not trained, and that no callback is there to thaw."""
    thaws = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    optimized = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, reason in plan.dense.items():
        if reason.startswith("frozen") and not thaws:
            raise ValueError(
                f"Layer {name!r} is {reason}: expected weights that are trained. Unfreeze it, or leave it out by "
                "Targets(exclude=[...])"
            )
    for c in plan.compressions:
        if not all(id(p) in optimized for p in c.parameters):
            raise ValueError(
                f"Layer {c.name!r}: expected its weight among the optimizer's parameters, but no optimizer has it. "
                "Add it there, or leave the layer out by Targets(exclude=[...])"
            )


def check_optimizers(trainer: pl.Trainer, name: str) -> None:
    """Raise `ValueError` for optimizers that would not see the penalty as it is."""
    for optimizer in trainer.optimizers:
        if isinstance(getattr(optimizer, "optimizer", optimizer), LBFGS):
            raise ValueError(
                f"{name} adds the penalty to gradients, but LBFGS evaluates the loss by itself: expected an "
                "optimizer that takes one step per gradient, such as SGD or Adam"
            )
        if trainer.precision == "16-mixed" and any(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                "A fused optimizer under precision='16-mixed' unscales gradients after the penalty has been added: "
                "expected `fused=False`, or precision='bf16-mixed'"
            )


def warn_of_zeros(plan: Plan, rule: CostPenalty | CostBudget, state: LCState, mu0: float) -> None:
    """Right after the first C step: every layer that could have a rank has rank 0."""
    zero = [c for c in plan.compressions if state.choices[c.name] == ZERO]
    factorized = [c for c in plan.compressions if state.choices[c.name] not in (ZERO, DENSE)]
    if factorized or not zero or not isinstance(rule, CostPenalty):
        return
    some, every = least_mu(Plan(zero, {}, {}), rule, state.scales, state.metrics)
    but = "" if len(zero) == len(plan.compressions) else " that does not stay dense"
    warnings.warn(
        f"Every layer{but} has rank 0 at mu0 = {mu0:g}: lambda_ = {rule.lambda_:g} outweighs all "
        f"weights. With mu0 above {some:.2g} at least one layer has not, with mu0 above {every:.2g} none has",
        stacklevel=2,
    )


def warn_of_dense(plan: Plan, rule: CostPenalty | CostBudget, state: LCState, mu: float, mu0: float) -> None:
    """Right after the C step at this mu: nothing is compressed."""
    dense = all(choice == DENSE for choice in state.choices.values())
    if not dense or not isinstance(rule, CostPenalty):
        return
    least = 1.005 * least_lambda(plan, rule, state, mu)  # three digits of it are not too few
    begins = "" if mu == mu0 else f", above {least * mu0 / mu:.3g} at mu0 = {mu0:g},"
    warnings.warn(
        f"Every layer is dense at mu = {mu:.3g}: lambda_ = {rule.lambda_:g} is worth no rank. With lambda_ "
        f"above {least:.3g}{begins} at least one layer would not stay dense",
        stacklevel=2,
    )


def warn_of_learning_rate(trainer: pl.Trainer, name: str, mu: float, stiff: float = 1.0) -> bool:
    """Whether it had to be said that gradient descent on the penalty `mu/2 ||W - ...||^2` will diverge. In a metric
    this is as stiff as its largest eigenvalue is, `stiff`."""
    ratio = max((stability(o, mu * stiff) for o in trainer.optimizers if isinstance(o, SGD)), default=0.0)
    if ratio > 0.8:
        beside = f" and the metric's largest eigenvalue, {stiff:.3g}," if stiff != 1 else ""
        warnings.warn(
            f"The learning rate times {name} = {mu:.3g}{beside} is {ratio:.2f} of what gradient descent on the "
            "penalty is stable at: lower the learning rate (`lr_decay`), `growth` or `steps`",
            stacklevel=2,
        )
    return ratio > 0.8


def lambda_in_words(plan: Plan, cost: Cost, lambda_: float, scales: Mapping[str, float] | None) -> str:
    """What lambda amounts to for these layers; `scales` are their `||W||^2` if it is multiplied by them."""
    units: dict[type, str] = {Macs: "million multiply-adds", Params: "million weights", Latency: "millisecond"}
    factors = scales or {c.name: 1.0 for c in plan.compressions}
    dense = sum(lambda_ / MILLION * factors[c.name] * c.cost(cost, DENSE) for c in plan.compressions)
    amount = f"lambda = {lambda_:.3g}"
    if scales:
        low, high = min(scales.values()), max(scales.values())
        amount += f" x ||W||^2 ({low:.3g} to {high:.3g}) = {lambda_ * low:.3g} to {lambda_ * high:.3g}"
    unit = units.get(type(cost), "million units of cost")
    return f"{amount} in loss per {unit}.\nThese layers, dense, cost {dense:.3g} in loss."


def warn_of_gap(gap: float) -> None:
    """Warn where training has ended far from what is deployed."""
    if gap > FAR:
        warnings.warn(
            f"Learning-compression has ended with ||W - Theta|| / ||W|| = {gap:.2g}: what is deployed is far from what "
            f"was trained. Expected below {FAR:g}; take more C steps, a larger growth, or longer L steps",
            stacklevel=2,
        )
