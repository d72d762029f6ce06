"""Lines that say where a run is."""

from __future__ import annotations

import time

import pytorch_lightning as pl

from lowrank_pl.terminal import say


class Progress:
    """One line for each stage of a run, on standard output, after the seconds since it began here."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self._begin
        say(f"{seconds:5.0f} s  {text}")


class EpochLines(pl.Callback):
    """In a training without a progress bar, a line at every tenth of it."""

    def __init__(self, progress: Progress, stage: str) -> None:
        self.progress, self.stage, self._tenths = progress, stage, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tenths = int(10 * _share(trainer, trainer.current_epoch))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        tenths = int(10 * _share(trainer, epoch))
        if trainer.progress_bar_callback is not None or tenths <= self._tenths:
            return
        self._tenths = tenths
        whole = f" of {trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        accuracy = trainer.callback_metrics.get("val/accuracy")
        known = "" if accuracy is None else f", validation accuracy {100 * float(accuracy):.2f} %"
        self.progress.say(f"{self.stage}: epoch {epoch}{whole}{known}")


def _share(trainer: pl.Trainer, epochs: int) -> float:
    """How much of its longest possible course a training has gone."""
    pairs = [(epochs, trainer.max_epochs or -1), (trainer.global_step, trainer.max_steps)]
    return max((done / whole for done, whole in pairs if whole > 0), default=0.0)
