"""The end of a process that was asked to end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import pytorch_lightning as pl


class Interrupted(Exception):
    """A signal asked for the end, and what is needed to go on is on disk."""


class Stop(pl.Callback):
    """Whether SIGINT or SIGTERM has asked for the end. While `waits` the first one waits for `check`, else, where there
    is nothing to save, it raises `Interrupted` wherever that may be; a second one ends the process at once. Among a
    Trainer's callbacks, because Lightning sets handlers of its own."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False
        self.listen()

    def listen(self) -> None:
        """From now on, in place of whoever listens."""
        if threading.current_thread() is threading.main_thread():  # as Python has it
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._hear)

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signal is not None:
            raise Interrupted

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listen()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.listen()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self.waits:
            raise Interrupted
