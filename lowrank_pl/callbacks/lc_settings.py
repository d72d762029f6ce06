"""What belongs together among the settings of learning-compression: the L step, and the schedule of mu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, final

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


@final
@dataclass(frozen=True)
class MuSchedule:
    """How mu grows, and when it ends: `mu = mu0 * growth^j` at C step j, counted from 0, for `steps` C steps.

    A C step keeps what is worth `lambda / mu`: with a large mu0 the ranks of the first C step are near the final ones,
    and training has little say in them. Choose it so that the first ranks (`lowrank/rank/...`) are well below what you
    expect at the end. With a budget the first ranks meet it at any mu0, and few change later: to learn ranks, give a
    lambda. It ends before `steps` when no rank has changed for `patience` C steps and `||W - Theta|| / ||W||` is below
    `tolerance`.
    """

    mu0: float = 1e-3
    growth: float = 1.2
    steps: int = 40
    patience: int = 5
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("patience", self.patience, 1)
        check_number("mu0", self.mu0, lambda x: 0 < x < float("inf"), "a number above 0")
        check_number("growth", self.growth, lambda x: 1 < x < float("inf"), "a number above 1")
        check_number("tolerance", self.tolerance, lambda x: 0 <= x < float("inf"), "a number of at least 0")

    def mu(self, j: int) -> float:
        """The penalty's weight at C step j."""
        return self.mu0 * self.growth**j


class LCSettings(TypedDict, total=False):
    """The fields of both as arguments of `LearningCompression`."""

    mu0: float
    growth: float
    steps: int
    patience: int
    tolerance: float
    l_step_epochs: int | None
    l_step_steps: int | None
    penalty: Literal["augmented", "quadratic"]
    lr_decay: float
    restart_lr: bool
    clear_momentum: bool


_OF_SCHEDULE = frozenset(MuSchedule.__dataclass_fields__)


def schedule_and_l_step(
    schedule: MuSchedule | None, l_step: LStep | None, names: LCSettings
) -> tuple[MuSchedule, LStep]:
    """Both, each as it was given or else of the single fields.

    Raises `TypeError` for unknown fields and other types, `ValueError` for a field beside the object that holds it.
    """
    unknown = sorted(set(names) - set(LCSettings.__annotations__))
    if unknown:
        raise TypeError(f"LearningCompression got an unexpected keyword argument {unknown[0]!r}")
    of_schedule = {name: value for name, value in names.items() if name in _OF_SCHEDULE}
    of_l_step = {name: value for name, value in names.items() if name not in _OF_SCHEDULE}
    _check_given("schedule", schedule, MuSchedule, "MuSchedule(mu0=1e-4)", of_schedule)
    _check_given("l_step", l_step, LStep, "LStep(epochs=2)", of_l_step)
    return (
        schedule or MuSchedule(**of_schedule),  # type: ignore[arg-type]
        l_step or LStep(**{name.removeprefix("l_step_"): value for name, value in of_l_step.items()}),  # type: ignore[arg-type]
    )


def _check_given(name: str, given: object, kind: type, example: str, fields: dict[str, Any]) -> None:
    if given is not None and not isinstance(given, kind):
        raise TypeError(f"Expected argument `{name}` to be a {kind.__name__} such as {example} but got {given!r}")
    if given is not None and fields:
        raise ValueError(f"Expected argument `{name}` or its fields {sorted(fields)} but got both")
