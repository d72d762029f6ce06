"""The plain module at the end of a fit."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.extraction import extract, extracted_part
from lowrank_pl.files import check_folder
from lowrank_pl.report import Report, summarize, summarize_layers
from lowrank_pl.storage import save_compressed
from lowrank_pl.surgery import Trace, detached_copy


class ExtractStructure(pl.Callback):
    """When the fit has ended: `extracted`, a copy of the network with modules of factors, and `report`, its table.

    Needs a compressing callback such as `DeepTwist` beside it, in any order; takes the factors of its last projection.
    With `submodule`, a dotted name such as `"net"`, that part of the LightningModule is what is extracted; else all of
    it. With `dirpath` it is saved there, for `load_compressed`.
    """

    def __init__(self, dirpath: str | Path | None = None, submodule: str | None = None) -> None:
        self.dirpath, self.submodule = dirpath, submodule
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
        if self.submodule is not None and self.submodule not in dict(pl_module.named_modules()):
            raise ValueError(
                f"Expected argument `submodule` to name a part of {type(pl_module).__name__} but got "
                f"{self.submodule!r}; it has {', '.join(name for name, _ in pl_module.named_children())}"
            )

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
        plan, last = method.plan, method.distortion
        notes = {c.name: c.note(last.choices[c.name]) for c in plan.compressions}
        whole = extract(pl_module, plan, last.structures, notes, method.trace, shared=(trainer,), in_memory=True)
        dense = detached_copy(pl_module, shared=(trainer,))
        for copied in (whole, dense):
            _forget(copied, trainer)
        self.extracted = extracted_part(whole, self.submodule or "")
        self.report = _report(dense, whole, self.submodule or "", method.trace)
        if self.dirpath is not None and trainer.is_global_zero:
            save_compressed(self.extracted, self.dirpath)

    def _method(self, trainer: pl.Trainer) -> CompressionCallback:
        methods = [callback for callback in trainer.callbacks if isinstance(callback, CompressionCallback)]  # type: ignore[attr-defined]
        if len(methods) != 1:
            raise ValueError(
                "ExtractStructure needs exactly one compressing callback beside it, such as "
                f"DeepTwist(), but the Trainer has {len(methods)}"
            )
        return methods[0]


def _forget(module: nn.Module, trainer: pl.Trainer) -> None:
    """Drop a copy's references to the trainer, which keeps data and callbacks alive."""
    for part in module.modules():
        for attribute, value in list(vars(part).items()):
            if value is trainer:
                setattr(part, attribute, None)


def _report(dense: nn.Module, whole: nn.Module, name: str, trace: Trace | None) -> Report:
    """Measured on the inputs that this part was called with, or, layer by layer, on those of its layers."""
    dense, part = dense.get_submodule(name), extracted_part(whole, name)
    if trace is not None and name in trace.arguments:
        return summarize(dense, part, trace.arguments[name])
    return summarize_layers(dense, part, Trace() if trace is None else trace.under(name))
