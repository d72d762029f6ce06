"""The plain module at the end of a fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.callbacks.quiet import check_copyable
from lowrank_pl.extraction import difference, extract, part_of
from lowrank_pl.files import check_folder
from lowrank_pl.names import under
from lowrank_pl.report import Report, summarize, summarize_layers
from lowrank_pl.storage import check_savable, save_compressed
from lowrank_pl.surgery import detached_copy, uncopyable
from lowrank_pl.tracing import Trace


class ExtractStructure(pl.Callback):
    """When the fit has ended: `extracted`, a copy of the network with modules of factors, and `report`, its table.

    Needs a compressing callback such as `DeepTwist` beside it, in any order; takes the factors of its last projection.
    With `submodule`, a dotted name such as `"net"`, that part of the LightningModule is what is extracted, and nothing
    else is copied; else all of it. With `dirpath` it is saved there, for `load_compressed`, before anything is
    measured. Timing, of what fits into memory and about a minute, is left out with `latency=False`.

    Raises `ValueError` at setup for a part that does not exist or cannot be copied or saved. At the end of a fit only
    the verification of a layer raises; what else goes wrong is a warning.
    """

    def __init__(self, dirpath: str | Path | None = None, submodule: str | None = None, latency: bool = True) -> None:
        if not isinstance(latency, bool):
            raise TypeError(f"Expected argument `latency` to be True or False but got {latency!r}")
        self.dirpath, self.submodule, self.latency = dirpath, submodule, latency
        self.extracted: nn.Module | None = None
        self.report: Report | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._method(trainer)
        if self.dirpath is not None and Path(self.dirpath).is_file():
            raise ValueError(f"Expected argument `dirpath` to be a folder but {self.dirpath} is a file")
        if self.dirpath is not None and trainer.is_global_zero:
            try:
                check_folder(Path(self.dirpath))
            except OSError as error:
                raise OSError(f"Expected argument `dirpath` to be a folder to write into ({error})") from error
        part = part_of(pl_module, self.submodule or "")
        if stage == "fit":
            check_copyable(part, trainer, "ExtractStructure", "give `submodule`, the part to extract")
            if self.dirpath is not None:
                check_savable(part)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._extract(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and self._method(trainer).trace is not None:
            self._extract(trainer, pl_module)

    def _extract(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        method = self._method(trainer)
        method.close(trainer, pl_module)
        assert method.plan is not None
        assert method.distortion is not None
        plan, last, name = method.plan, method.distortion, self.submodule or ""
        notes = {c.name: c.note(last.choices[c.name]) for c in plan.compressions}
        part = part_of(pl_module, name)
        left_out = uncopyable(part, (trainer,))  # since setup
        shared = (trainer, *left_out.values())
        self.extracted = extract(
            pl_module, plan, last.structures, notes, method.trace, shared=shared, in_memory=True, part=name
        )
        _forget(self.extracted, shared)
        if self.dirpath is not None and trainer.is_global_zero:
            save_compressed(self.extracted, self.dirpath)
        if left_out:
            warnings.warn(
                f"The extracted network is without what cannot be copied: {', '.join(left_out)}", stacklevel=2
            )
        try:
            self._compare(part, method.trace)
            self.report = self._measured(part, method.trace, shared)
        except Exception as error:  # of any kind: the network's own code, and memory
            self.report = summarize_layers(part, self.extracted, Trace(), latency=False)
            warnings.warn(
                f"The network has been extracted but not measured: {type(error).__name__}: {error}", stacklevel=2
            )

    def _compare(self, projected: nn.Module, trace: Trace | None) -> None:
        """Warn where the whole network, or a part that `training_step` calls, is not the projected one."""
        assert self.extracted is not None
        arguments = {} if trace is None else under(self.submodule or "", trace.arguments)
        for name in [""] if "" in arguments else arguments:
            problem = difference(projected, self.extracted, arguments[name], name)
            if problem is not None:
                warnings.warn(f"The extracted network is not the projected one: {problem}", stacklevel=2)

    def _measured(self, part: nn.Module, trace: Trace | None, shared: tuple[Any, ...]) -> Report:
        """On the inputs that this part was called with, or, layer by layer, on those of its layers."""
        assert self.extracted is not None
        name, trace = self.submodule or "", Trace() if trace is None else trace
        dense = detached_copy(part, shared)
        _forget(dense, shared)
        if name in trace.arguments:
            return summarize(dense, self.extracted, trace.arguments[name], self.latency)
        return summarize_layers(dense, self.extracted, trace.under(name), self.latency)

    def _method(self, trainer: pl.Trainer) -> CompressionCallback:
        methods = [callback for callback in trainer.callbacks if isinstance(callback, CompressionCallback)]  # type: ignore[attr-defined]
        if len(methods) != 1:
            raise ValueError(
                "ExtractStructure needs exactly one compressing callback beside it, such as "
                f"DeepTwist(), but the Trainer has {len(methods)}"
            )
        return methods[0]


def _forget(module: nn.Module, things: tuple[Any, ...]) -> None:
    """Drop a copy's references to what it shares, such as the trainer, which keeps data and callbacks alive."""
    for part in module.modules():
        for attribute, value in list(vars(part).items()):
            if any(value is thing for thing in things):
                setattr(part, attribute, None)
