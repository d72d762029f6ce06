"""What happens to optimizers and schedules between two L steps."""

from __future__ import annotations

import math

import pytorch_lightning as pl
from torch.optim import SGD, Optimizer


def start_l_step_(trainer: pl.Trainer, decay: float, restart: bool) -> None:
    """Multiply learning rates by `decay`; with `restart` go back to the initial ones, and to the schedules' start.

    The initial learning rates are multiplied too, in the optimizers' own groups and in the schedules, so that they are
    part of every checkpoint.
    """
    if decay == 1.0 and not restart:
        return
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"]) * decay
            group["lr"] = group["initial_lr"] if restart else group["lr"] * decay
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [base * decay for base in scheduler.base_lrs]
        if restart and hasattr(scheduler, "last_epoch"):
            scheduler.last_epoch = 0


def clear_momentum_(trainer: pl.Trainer) -> None:
    """Forget what the optimizers have gathered from gradients."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()


def stiffest(trainer: pl.Trainer, mu: float) -> float:
    """How many times as stiff as `mu/2 ||w||^2` a penalty may be for gradient descent at these learning rates.

    Half of what it is stable at is left to the loss. At least 1; no bound for optimizers that divide by gradients.
    """
    share = max((stability(o, mu) for o in trainer.optimizers if isinstance(o, SGD)), default=0.0)
    return max(0.5 / share, 1.0) if share else math.inf


def stability(optimizer: Optimizer, mu: float) -> float:
    """`lr mu` of stochastic gradient descent as a share of the largest at which it does not diverge on `mu/2 ||w||^2`.

    That is 2 without momentum, `2 + 2m` with momentum m and `(2 + 2m) / (1 + 2m)` with Nesterov's.
    """
    shares = []
    for group in optimizer.param_groups:
        m = group.get("momentum", 0.0)
        limit = (2 + 2 * m) / (1 + 2 * m) if group.get("nesterov") else 2 + 2 * m
        shares.append(group["lr"] * mu / limit)
    return max(shares, default=0.0)
