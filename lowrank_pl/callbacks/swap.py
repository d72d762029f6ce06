"""Projected weights in a module's memory, and the way back to its training weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_pl.callbacks.stash import Stash
from lowrank_pl.compression import Plan
from lowrank_pl.fingerprints import fingerprints


class Swap:
    """Which weights a module holds: those of training, or projected ones, for an evaluation or when training has ended.

    Checkpoints always get the training weights.
    """

    def __init__(self) -> None:
        self._projected: list[tuple[int, int]] | None = None  # the weights' fingerprints right after a projection
        self._evaluating: Stash | None = None
        self._closed: Stash | None = None

    def mark(self, plan: Plan) -> None:
        """The module holds projected weights now."""
        self._projected = fingerprints(plan.parameters)

    def is_marked(self, plan: Plan) -> bool:
        """Whether the module holds the last projection, untouched."""
        return self._projected == fingerprints(plan.parameters)

    def unmark(self) -> None:
        self._projected = None

    def start_evaluation(self, plan: Plan, project: Callable[[], Any]) -> None:
        self._evaluating = Stash(plan.parameters)
        project()
        self._evaluating.seal()

    def end_evaluation(self) -> None:
        if self._evaluating is not None:
            self._evaluating.restore_()
            self._evaluating = None

    @property
    def is_closed(self) -> bool:
        """Whether projected weights were left in the module, and nobody has written to them since."""
        return self._closed is not None and self._closed.is_intact()

    @property
    def was_closed(self) -> bool:
        return self._closed is not None

    def close(self, tensors: Iterable[Tensor], project: Callable[[], Any]) -> None:
        """Leave projected weights in the module; `tensors` are all that this may write to."""
        closed = Stash(tensors)
        project()
        closed.seal()
        self._closed = closed

    def reopen(self) -> None:
        """Go on from the training weights, where they were closed and not written to since."""
        if self._closed is not None and self._closed.is_intact():
            self._closed.restore_()
        self._closed = self._projected = None

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """After closing: the training weights in place of the projected ones, for as long as it lasts."""
        assert self._closed is not None
        projected = Stash(self._closed.tensors)
        self._closed.restore_()
        try:
            yield
        finally:
            projected.restore_()
            self._closed.seal()

    def substitute(self, module: nn.Module, state_dict: dict[str, Any]) -> None:
        """Put the training weights into a state dict of `module`."""
        for stash in (self._evaluating, self._closed):
            if stash is not None and stash.is_intact():
                stash.substitute(module, state_dict)
