"""A training in phases, in each of which other layers learn."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.product_decay import deployed_layers
from lowrank_pl.runs.recipe import Phase


class Phases(pl.Callback):
    """Lets learn, in one fit, what the phase says that the current epoch is in; every phase starts with an optimizer
    that remembers nothing. It needs no state of its own to be taken up again.

    Raises `ValueError` at the start for a phase in which nothing learns.
    """

    def __init__(self, phases: Mapping[str, Phase]) -> None:
        self.phases = dict(phases)
        self._learning: list[nn.Parameter] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._learning = [p for p in pl_module.parameters() if p.requires_grad]
        for name, phase in self.phases.items():
            if len(self._fixed(phase, pl_module)) == len(self._learning):
                raise ValueError(f"Phase {name!r} has nothing to train: all layers are {phase.fixed}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fix(trainer.current_epoch, pl_module)  # also where an epoch is taken up in its middle

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fix(trainer.current_epoch, pl_module):
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in self._learning:
            parameter.requires_grad_(True)

    def _fix(self, epoch: int, module: pl.LightningModule) -> bool:
        """Whether a phase begins with this epoch."""
        begin = 0
        for phase in self.phases.values():
            if epoch < begin + phase.epochs:
                fixed = self._fixed(phase, module)
                for parameter in self._learning:
                    parameter.requires_grad_(id(parameter) not in fixed)
                    if id(parameter) in fixed:
                        parameter.grad = None
                return epoch == begin
            begin += phase.epochs
        return False

    def _fixed(self, phase: Phase, module: nn.Module) -> set[int]:
        layers = deployed_layers(module)
        linear = {id(p) for each, layout in layers.items() if layout.layer.kind == "linear" for p in each.parameters()}
        every = {id(p) for p in self._learning}
        return {None: set(), "linear": linear & every, "convolutions": every - linear}[phase.fixed]
