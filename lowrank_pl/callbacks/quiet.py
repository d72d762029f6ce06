"""Extra forward passes of a LightningModule that leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn

from lowrank_pl.processes import equalize_
from lowrank_pl.surgery import detached_copy, uncopyable


def check_copyable(module: nn.Module, trainer: pl.Trainer, who: str, advice: str) -> None:
    """Raise `ValueError` that names an attribute of which there can be no copy."""
    for name, value in uncopyable(module, (trainer,)).items():
        raise ValueError(
            f"{who} copies the {type(module).__name__}, but its attribute {name!r} is a {type(value).__name__} that "
            f"cannot be copied: keep it elsewhere (in the datamodule or a callback, say), or {advice}"
        )


def quiet_copy(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy that shares the trainer and logs nothing: what its `training_step` does to buffers, metrics and
    attributes is lost with it."""
    clone = cast(pl.LightningModule, detached_copy(pl_module, shared=(trainer,)))
    clone.trainer = trainer  # a copy of a LightningModule forgets it
    clone.log = clone.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    return clone


@torch.no_grad()
def training_loss(trainer: pl.Trainer, clone: pl.LightningModule, batch: Any, batch_idx: int) -> float:
    """The loss that `training_step` of a quiet copy gives for a batch, in the trainer's precision; the random state
    is as before."""
    devices = [clone.device] if clone.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.train_step_context():
        output = clone.training_step(batch, batch_idx)
    loss = output["loss"] if isinstance(output, dict) else output
    return float(loss) if isinstance(loss, (Tensor, float)) else float("nan")


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in module.modules() if isinstance(m, kinds) and m.track_running_stats]


@torch.no_grad()
def recalibrate_batch_norms_(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int) -> None:
    """Re-estimate running statistics as plain averages over so many training batches, everything else unchanged."""
    clone = quiet_copy(trainer, pl_module)
    clone.eval()
    norms = batch_norms(clone)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    loader = CombinedLoader(trainer.train_dataloader, mode="max_size_cycle")
    with _random_state_kept(clone):
        for i, (batch, _, _) in zip(range(batches), loader, strict=False):
            moved = trainer.strategy.batch_to_device(batch, clone.device)
            training_loss(trainer, clone, moved, i)
    for norm, fresh in zip(batch_norms(pl_module), norms, strict=True):
        statistics = norm.running_mean, norm.running_var
        for ours, theirs in zip(statistics, (fresh.running_mean, fresh.running_var), strict=True):
            assert ours is not None
            assert theirs is not None
            ours.copy_(theirs)
            equalize_([ours])


def _random_state_kept(module: pl.LightningModule) -> AbstractContextManager[None]:
    return torch.random.fork_rng([module.device] if module.device.type == "cuda" else [])
