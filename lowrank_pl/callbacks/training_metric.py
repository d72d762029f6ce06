"""In which sense a callback's structures are near to weights, and when it listens for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from torch import nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.checks import check_among, check_int, check_number
from lowrank_pl.compression import Plan
from lowrank_pl.methods import RunningMoments
from lowrank_pl.metric import Metric

NAMES = ("weights", "inputs", "inputs_and_gradients")


@final
@dataclass(frozen=True)
class TrainingMetric:
    """Nearness by what layers are given in training (see `RunningMoments`, also for what it takes in memory).

    `of`: `"inputs"`, or `"inputs_and_gradients"`, which also weighs outputs by the loss's gradients there; layers
    inside of others (projections of an attention, say) have no gradients of their own to be heard. Moments are taken
    from one batch whenever `every` optimizer steps have been made since the last one, at `places` positions of each
    image or sequence; a batch counts `decay` times less with every later one.
    """

    of: Literal["inputs", "inputs_and_gradients"] = "inputs"
    every: int = 25
    decay: float = 0.9
    places: int = 10

    def __post_init__(self) -> None:
        check_among("of", self.of, NAMES[1:])
        check_int("every", self.every, 1, "number of optimizer steps")
        check_number("decay", self.decay, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
        check_int("places", self.places, 1)

    @classmethod
    def given_by(cls, choice: MetricChoice) -> TrainingMetric | None:
        """None for `"weights"`. Raises `ValueError` for anything unknown."""
        if isinstance(choice, cls):
            return choice
        check_among("metric", choice, NAMES)
        return None if choice == "weights" else cls(choice)


MetricChoice: TypeAlias = Literal["weights", "inputs", "inputs_and_gradients"] | TrainingMetric


class MetricListener:
    """Hears the moments of a network that trains, when it is time; without a metric, never."""

    def __init__(self, metric: TrainingMetric | None) -> None:
        self.metric = metric
        with_gradients = metric is not None and metric.of == "inputs_and_gradients"
        self.moments = None if metric is None else RunningMoments(metric.decay, metric.places, gradients=with_gradients)
        self._heard_at: int | None = None  # the optimizer steps made by then
        self._asked: set[str] = set()  # targets of which a batch was heard, whether they ran in it or not
        self._others: set[str] = set()  # maps that have run, but may never be targets

    def start(self, module: nn.Module, plan: Plan | None, step: int, is_growing: bool) -> None:
        """Listen to this batch if it is time, which it is for a target of which none was heard.

        While the plan `is_growing`, layers that have not run yet are listened to in all batches, so that a target has
        moments from the batch on in which it first runs.
        """
        if self.metric is None or self.moments is None or self.moments.is_listening:
            return
        targets = None if plan is None else {c.name for c in plan.compressions}
        due = self._heard_at is None or step - self._heard_at >= self.metric.every
        due = due or (targets is not None and not targets <= self._asked)
        others: set[str] = set()
        if is_growing or targets is None:
            others = find_maps(module).keys() - self.moments.inputs.keys() - self._others
        names = targets if targets is not None and due else set()
        self._step, self._is_due, self._targets = step, due, targets
        if names or others:
            # gradients are made comparable among targets; before there are any, among all
            self.moments.start(module, names | others, step, silent=() if targets is None else others - names)

    def stop(self) -> None:
        """The batch has run. One in which nothing was heard was skipped: the next one counts."""
        if self.moments is None or not self.moments.is_listening:
            return
        heard, is_finite = self.moments.stop()
        self._others |= heard
        if self._is_due and heard and is_finite:
            self._heard_at = self._step
            self._asked |= self._targets if self._targets is not None else heard

    def keep(self, plan: Plan) -> None:
        """Forget what is no target."""
        if self.moments is not None:
            self._asked &= {c.name for c in plan.compressions}
            self.moments.keep({c.name for c in plan.compressions})

    def give_up(self) -> None:
        """Stop listening in the middle of a batch."""
        if self.moments is not None:
            self.moments.give_up()

    def metrics(self, plan: Plan) -> dict[str, Metric] | None:
        """Those of the targets; None for Frobenius norms everywhere."""
        return None if self.moments is None else self.moments.metrics(plan)

    def state_dict(self) -> dict[str, Any] | None:
        if self.moments is None:
            return None
        return {"at": self._heard_at, "asked": sorted(self._asked), **self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Of a checkpoint, if it has one; otherwise the next batch is heard."""
        if self.moments is not None and state is not None:
            self._heard_at, self._asked = state["at"], set(state["asked"])
            self.moments.load_state_dict(state)
