"""What a callback hears of the first batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_pl.surgery import Recorder, Trace


class Listener:
    """Listens to the first batch that a module runs; `trace` is what it heard, also from a checkpoint."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self._recorder: Recorder | None = None

    def start(self, module: nn.Module) -> None:
        """Listen from now on, where nothing has been heard, or only what a checkpoint keeps, which has no samples."""
        if self._recorder is None and (self.trace is None or not self.trace.samples):
            self._recorder = Recorder(module)

    def stop(self) -> bool:
        """Whether something was heard; it is in `trace`. A batch that ran no layer was skipped: the next one counts."""
        if self._recorder is None:
            return False
        heard, self._recorder = self._recorder.stop(), None
        if not heard.calls and not heard.odd:
            return False
        self.trace = heard
        return True

    def give_up(self) -> None:
        """Stop listening in the middle of a batch."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.trace is None else self.trace.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.trace = None if state is None else Trace.from_state_dict(state)
