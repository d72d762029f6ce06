"""The end of a training that leads nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

_TRY = (
    "Try a smaller learning rate (`optimizer.lr`, and those of `reference` and `finetune`) in another run, or "
    "`lowrank-pl resume RUN trainer.gradient_clip_val=1`"
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
        self._since: Tensor | None = None  # the step of the first such loss, or -1; a tensor: no step waits for a GPU

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        finite = torch.isfinite(loss.detach()).all()
        never = torch.full((), -1, device=loss.device)
        since = never if self._since is None else self._since
        first = torch.where(since < 0, torch.full_like(never, trainer.global_step), since)
        self._since = torch.where(finite, never, first)

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
        if self._since is not None and (step := int(self._since)) >= 0:
            raise Diverged(f"{self.stage} diverged: the loss is not finite from step {step} on. {_TRY}")
