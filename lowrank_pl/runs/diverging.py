"""The end of a training that leads nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

_TRY = (
    "Try a smaller learning rate (`optimizer.lr`, and those of `reference` and `finetune`) in another run, or "
    "`lowrank-pl resume RUN optimizer.lr=...` or trainer.gradient_clip_val=1, from the last checkpoint on"
)


class Diverged(Exception):
    """The loss or the weights of a training are no longer finite."""


class FiniteLoss(pl.Callback):
    """Raises `Diverged` at the end of an epoch, and before a checkpoint is written, where the loss of the latest step
    is not finite; and at the end where a weight is not.

    A loss that becomes finite again (a scaler of half precision leaves out such steps) is none of its business.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._losses: list[tuple[int, Tensor]] = []  # since the last check: no step waits for a GPU
        self._since: int | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append((trainer.global_step, loss.detach()))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check()
        for name, tensor in pl_module.state_dict().items():
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                raise Diverged(
                    f"{self.stage} diverged: `{name}` is not finite after step {trainer.global_step}, the last one. "
                    f"{_TRY}"
                )

    def check(self) -> None:
        """Raise `Diverged` if the latest loss was not finite."""
        if self._losses:
            finite = torch.isfinite(torch.stack([loss for _, loss in self._losses])).tolist()
            for (step, _), is_finite in zip(self._losses, finite, strict=True):
                self._since = None if is_finite else self._since or step
            self._losses.clear()
        if self._since is not None:
            raise Diverged(f"{self.stage} diverged: the loss is not finite from step {self._since} on. {_TRY}")
