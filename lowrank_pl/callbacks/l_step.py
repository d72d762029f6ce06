"""What an L step of learning-compression is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, final

from lowrank_pl.checks import check_among, check_int, check_number


@final
@dataclass(frozen=True)
class LStep:
    """The training between two C steps: how long it is, and how it starts.

    `epochs`, or optimizer `steps`: exactly one of them. `penalty`: `"augmented"`, or `"quadratic"`, without
    multipliers. `lr_decay` multiplies the (initial) learning rate at every L step: `lr * lr_decay^j`; with `restart_lr`
    each starts at the initial learning rate, and its schedule anew; with `clear_momentum` with the optimizer's state
    empty (as the authors' code does).
    """

    epochs: int | None = None
    steps: int | None = None
    penalty: Literal["augmented", "quadratic"] = "augmented"
    lr_decay: float = 1.0
    restart_lr: bool = False
    clear_momentum: bool = False

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                "Expected exactly one of the arguments `l_step_epochs` and `l_step_steps` (of LStep: `epochs`, `steps`)"
            )
        for name, count in (("l_step_epochs", self.epochs), ("l_step_steps", self.steps)):
            if count is not None:
                check_int(name, count, 1)
        check_among("penalty", self.penalty, ("augmented", "quadratic"))
        check_number("lr_decay", self.lr_decay, lambda x: 0 < x < float("inf"), "a number above 0")


class LStepNames(TypedDict, total=False):
    """The same as arguments of `LearningCompression`."""

    l_step_epochs: int | None
    l_step_steps: int | None
    penalty: Literal["augmented", "quadratic"]
    lr_decay: float
    restart_lr: bool
    clear_momentum: bool


def l_step_of(names: LStepNames) -> LStep:
    """The L step that these arguments describe. Raises `TypeError` for others."""
    unknown = sorted(set(names) - set(LStepNames.__annotations__))
    if unknown:
        raise TypeError(f"LearningCompression got an unexpected keyword argument {unknown[0]!r}")
    values = {name.removeprefix("l_step_"): value for name, value in names.items()}
    return LStep(**values)  # type: ignore[arg-type]
