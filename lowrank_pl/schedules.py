"""Learning-rate schedules that step with the optimizer.

Each takes an optimizer, the number of its steps in the whole training (`inf` if there is no end), and the
number of its steps in one epoch.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def constant(optimizer: Optimizer, total_steps: float, steps_per_epoch: int) -> LRScheduler:
    """The optimizer's own learning rate throughout."""
    return _times(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, total_steps: float, steps_per_epoch: int) -> LRScheduler:
    """Half a cosine, from the optimizer's learning rate to 0 (Loshchilov & Hutter, ICLR 2017)."""
    if not math.isfinite(total_steps):
        raise ValueError("a cosine schedule needs an end: set `max_epochs` or `max_steps` of the Trainer")
    return _times(optimizer, lambda step: (1 + math.cos(math.pi * min(step / total_steps, 1))) / 2)


def step_decay(
    optimizer: Optimizer,
    total_steps: float,
    steps_per_epoch: int,
    milestones: Sequence[float] = (100, 150),
    gamma: float = 0.1,
) -> LRScheduler:
    """Times `gamma` at each of the `milestones`, which are epochs."""
    if list(milestones) != sorted(milestones) or min(milestones, default=0) < 0:
        raise ValueError(f"Expected argument `milestones` to be epochs that grow but got {list(milestones)}")
    steps = [round(epoch * steps_per_epoch) for epoch in milestones]
    return _times(optimizer, lambda step: gamma ** sum(step >= milestone for milestone in steps))


def exponential(optimizer: Optimizer, total_steps: float, steps_per_epoch: int, gamma: float = 0.99) -> LRScheduler:
    """Times `gamma` after every epoch."""
    return _times(optimizer, lambda step: gamma ** (step // steps_per_epoch))


def in_phases(
    optimizer: Optimizer,
    total_steps: float,
    steps_per_epoch: int,
    parts: Sequence[tuple[int, float]],
    scheduler: Callable[..., LRScheduler] = constant,
) -> LRScheduler:
    """Another schedule from its start in each of the `parts`, which are epochs and a factor.

    Raises `ValueError` for a schedule that is no `LambdaLR`.
    """
    steps = [epochs * steps_per_epoch for epochs, _ in parts]
    trial = SGD([torch.zeros(1)], lr=1.0)
    made = [scheduler(trial, total_steps=count, steps_per_epoch=steps_per_epoch) for count in steps]
    if not all(isinstance(each, LambdaLR) for each in made):
        raise ValueError("phases need a schedule of lowrank_pl.schedules, or another that makes a LambdaLR")
    factors = [each.lr_lambdas[0] for each in made if isinstance(each, LambdaLR)]

    def factor(step: int) -> float:
        for count, each, (_, share) in zip(steps, factors, parts, strict=True):
            if step < count:
                return share * float(each(step))
            step -= count
        return parts[-1][1] * float(factors[-1](steps[-1]))

    return _times(optimizer, factor)


def _times(optimizer: Optimizer, factor: Callable[[int], float]) -> LRScheduler:
    return LambdaLR(optimizer, factor)
