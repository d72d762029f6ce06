"""Checkpoints from which a run goes on as if it had not been stopped."""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from lowrank_pl.checksums import remove_summed, write_summed
from lowrank_pl.data.loader import ResumableLoader
from lowrank_pl.reading import first_line
from lowrank_pl.runs.checkpoint_file import read_checkpoint
from lowrank_pl.runs.metrics_file import MetricsFile
from lowrank_pl.runs.stopping import Stop


class Resumable(Checkpoint):
    """Writes checkpoints at the start of every epoch but the first (and every `every_n_steps`), keeps the newest two.

    Not at an epoch's end or before a validation, which Lightning would leave out on resuming. They hold, besides what
    Lightning puts in, all random states, the loader's place and the number of rows in `metrics.csv` with a digest of
    them. Where `stop` says so, training ends with the next one. With `force` a `metrics.csv` that does not fit is taken
    as it is.
    """

    def __init__(
        self,
        dirpath: str | Path,
        stop: Stop | None = None,
        every_n_steps: int | None = None,
        keep: int = 2,
        force: bool = False,
    ) -> None:
        self.force = force
        self.dirpath, self.stop = Path(dirpath), stop
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_epoch, self.last_step = -1, 0
        self._epoch_start = False
        self._steps: int | None = None
        self._state: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in _metrics_files(trainer):
            if self._state is None:
                logger.cut(0)
            else:  # up to 0.2 without a digest
                logger.cut(self._state["rows"], self._state.get("metrics"), self.force)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._state is not None:
            # not left to Lightning, which forgets it where `estimated_stepping_batches` has set up the data before
            if self._state["loader"] is not None:
                trainer.train_dataloader.load_state_dict(self._state["loader"])  # type: ignore[union-attr]
            _set_random_state(self._state["random"])
            self._steps = self._state["steps"]
            self._state = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is not None:  # Lightning counts one step too many for the logs
            trainer.fit_loop.epoch_loop._batches_that_stepped, self._steps = self._steps, None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0 and trainer.current_epoch > self.last_epoch:
            self.save(trainer, epoch_start=True)
            self._stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        validates = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if trainer.fit_loop._should_accumulate() or validates or ends:
            return
        by_steps = self.every_n_steps is not None and trainer.global_step - self.last_step >= self.every_n_steps
        if by_steps or (self.stop is not None and self.stop.signal is not None):
            self.save(trainer)
            self._stop()

    def _stop(self) -> None:
        if self.stop is not None:
            self.stop.check()

    def save(self, trainer: pl.Trainer, epoch_start: bool = False) -> None:
        """Write a checkpoint, then remove all but the newest."""
        self.last_epoch, self.last_step, self._epoch_start = trainer.current_epoch, trainer.global_step, epoch_start
        trainer.save_checkpoint(self.dirpath / f"step={trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints(self.dirpath)[self.keep :]:
                remove_summed(old)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._epoch_start:  # Lightning sets these back after this hook, and on resuming takes the epoch for done
            for name, state in checkpoint["loops"]["fit_loop"].items():
                if name.startswith("epoch_loop."):
                    _set_back(state)
        loader, place = trainer.train_dataloader, None
        if isinstance(loader, ResumableLoader):
            place = {"batches": 0} if self._epoch_start else loader.state_dict()
        saved = [logger.saved() for logger in _metrics_files(trainer)]
        checkpoint[_KEY] = {
            "last_epoch": self.last_epoch,
            "last_step": self.last_step,
            "rows": saved[0][0] if saved else 0,
            "metrics": saved[0][1] if saved else None,
            "loader": place,
            "steps": trainer.fit_loop.epoch_loop._batches_that_stepped if self._epoch_start else None,
            "random": _random_state(),
            "optimizer": _settings(pl_module),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._state = checkpoint.get(_KEY)
        if self._state is not None:
            self.last_epoch, self.last_step = self._state["last_epoch"], self._state["last_step"]
            _change_settings_(checkpoint, self._state.get("optimizer", {}), _settings(pl_module))


def _settings(module: pl.LightningModule) -> dict[str, Any]:
    """What the config says of the optimizer."""
    return dict(getattr(getattr(module, "optimizer", None), "keywords", {}))


def _change_settings_(checkpoint: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Put what has changed since the checkpoint into what Lightning restores: of learning rates the schedule's share,
    and what a method has made of them, stay."""
    changed = {key: value for key, value in now.items() if key in before and value != before[key]}
    groups = [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]
    for group in groups:
        group.update({key: value for key, value in changed.items() if key in group and key != "lr"})
    if "lr" in changed and before["lr"]:
        factor = changed["lr"] / before["lr"]
        for values in (*groups, *checkpoint["lr_schedulers"]):
            for key in values.keys() & {"lr", "initial_lr", "base_lrs", "_last_lr"}:
                old = values[key]
                values[key] = [each * factor for each in old] if isinstance(old, list) else old * factor


def _set_back(progress: Any) -> None:
    """What Lightning's loops have counted in the current epoch."""
    for name, value in progress.items() if isinstance(progress, dict) else ():
        if name == "current":
            value.update(dict.fromkeys(value, 0))
        elif name == "is_last_batch":
            progress[name] = False
        else:
            _set_back(value)


def _metrics_files(trainer: pl.Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read without running what is in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        memory = io.BytesIO()
        torch.save(checkpoint, memory)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_summed(Path(path), memory.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = {path: re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in folder.glob("*.ckpt")}
    return sorted((path for path, match in found.items() if match), key=lambda path: -int(found[path][1]))  # type: ignore[index]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; warns of newer ones that cannot.

    Raises `ValueError` if there are some and none can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            read_checkpoint(path)
        except Exception as error:  # of many kinds: the file may hold anything
            reason = first_line(error)[:200]
            last = path == found[-1]
            warnings.warn(f"{path} cannot be read ({reason}){'' if last else ': going on from the one before'}",
                          stacklevel=2)  # fmt: skip
        else:
            return path
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read: remove them to start from the beginning")
    return None


_KEY = "lowrank_pl_resumable"


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
