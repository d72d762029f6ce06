"""What a callback hears of the first batches."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_pl.adapters import find_maps, obstacles
from lowrank_pl.tracing import Recorder, Trace, count_inputs

BATCHES = 100  # or an epoch, if that is shorter


class Listener:
    """Listens to the batches that a module runs until every layer has run, and no longer than an epoch; `trace` is what
    it heard, also from a checkpoint. `batch_size` is that of all batches, where it cannot be told from their tensors.
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self.trace: Trace | None = None
        self.batch_size = batch_size
        self._waiting = False  # for layers that have not run yet
        self._recorder: Recorder | None = None

    @property
    def is_listening(self) -> bool:
        return self._recorder is not None

    def start(self, module: nn.Module, batch: Any) -> None:
        """Listen from now on, where nothing has been heard, or not all, or only what a checkpoint keeps, which has no
        samples. Raises `ValueError` where the batch's size cannot be told."""
        if self._recorder is None and (self.trace is None or self._waiting or not self.trace.samples):
            self._recorder = Recorder(module, count_inputs(batch, self.batch_size))

    def stop(self, module: nn.Module) -> bool:
        """Whether something was heard; it is in `trace`. A batch that ran no layer was skipped: the next one counts."""
        if self._recorder is None:
            return False
        heard, self._recorder = self._recorder.stop(), None
        if not heard.calls and not heard.odd:
            return False
        if self.trace is None:
            self.trace, self._waiting = heard, True
        elif self._waiting:
            self.trace.add(heard)
        else:  # a resumed run goes on with the counts that it had
            self.trace.samples, self.trace.arguments, self.trace.called = heard.samples, heard.arguments, heard.called
        self._waiting = self._waiting and self.trace.batches < BATCHES and self._is_missing_any(module)
        return True

    def _is_missing_any(self, module: nn.Module) -> bool:
        assert self.trace is not None
        hidden = {name for name, reason in obstacles(module).items() if not reason.startswith("lazy")}
        known = {*self.trace.calls, *self.trace.odd, *hidden}
        return any(name not in known for name in find_maps(module))

    def end_epoch(self) -> None:
        """What has not run by now is taken never to run."""
        self._waiting = False

    def give_up(self) -> None:
        """Stop listening in the middle of a batch."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.trace is None else {**self.trace.state_dict(), "waiting": self._waiting}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.trace = None if state is None else Trace.from_state_dict(state)
        self._waiting = state is not None and state.get("waiting", False)
