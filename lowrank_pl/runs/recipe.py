"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.callbacks import CompressionCallback
from lowrank_pl.checks import check_among, check_int, check_number
from lowrank_pl.module import Classifier, check_product_decay
from lowrank_pl.runs.one_shot import OneShot
from lowrank_pl.schedules import constant, in_phases


@dataclass(frozen=True)
class Phase:
    """A part of a training: so many epochs at `lr_factor` times the optimizer's learning rate, in which the layers that
    are `fixed` do not learn: `"linear"`, or `"convolutions"`, with all else that is in no linear layer."""

    epochs: int
    fixed: Literal["linear", "convolutions"] | None = None
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        check_int("epochs", self.epochs, 1)
        check_among("fixed", self.fixed, ("linear", "convolutions", None))
        check_number("lr_factor", self.lr_factor, lambda x: 0 < x <= 1e6, "a number above 0")


@dataclass(frozen=True)
class Training:
    """How a network is trained: what makes its optimizer and schedule, and for how many epochs (None: the trainer's).

    Or in `phases`, by name, one after another, each with the schedule from its start. With `always`, a reference is
    trained also for methods that could start from untrained weights. `product_decay` is weight decay on the weights
    that layers deploy as: on the product where a layer is factors.
    """

    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None = None
    epochs: int | None = None
    always: bool = False
    product_decay: float = 0.0
    phases: Mapping[str, Phase] = field(default_factory=dict)

    def __post_init__(self) -> None:  # before anything is trained: a fine-tuning may be hours away
        check_product_decay(self.product_decay)
        if self.phases and self.epochs is not None:
            raise ValueError("Expected `epochs` to be left out, or null, because each of the `phases` has its own")

    @property
    def length(self) -> int | None:
        """Epochs, of all phases."""
        return sum(phase.epochs for phase in self.phases.values()) if self.phases else self.epochs

    @property
    def schedule(self) -> Callable[..., Any] | None:
        """What makes the schedule of the whole."""
        if not self.phases:
            return self.scheduler
        parts = [(phase.epochs, phase.lr_factor) for phase in self.phases.values()]
        return partial(in_phases, parts=parts, scheduler=self.scheduler or constant)


@dataclass(frozen=True)
class Recipe:
    """What a run is made of.

    `compression` is a callback, or what compresses a module before, or without, training, or None. With `reference` the
    network is trained first, unless the folder `references` has it under `reference_key` from another run.
    `finetune` trains the extracted network's factors at the end. With `report_train`, loss and accuracy on the training
    images are reported too. Metrics go to `metrics.csv`, and to `make_logger(save_dir=...)` with the `hyperparameters`.
    Checkpoints are written at the start of every epoch but the first, and every `checkpoint_every` optimizer steps.
    """

    data: pl.LightningDataModule
    net: nn.Module
    training: Training
    make_trainer: Callable[..., pl.Trainer]
    make_logger: Callable[..., Any] | None = None
    compression: CompressionCallback | OneShot | None = None
    reference: Training | None = None
    finetune: Training | None = None
    references: Path | None = None
    reference_key: str = ""
    seed: int = 0
    channels_last: bool = False
    label_smoothing: float = 0.0
    report_train: bool = False
    checkpoint_every: int | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def classifier(self, net: nn.Module, training: Training) -> Classifier:
        """The network as it is trained and tested."""
        return Classifier(
            net,
            training.optimizer,
            training.schedule,
            self.channels_last,
            self.label_smoothing,
            training.product_decay,
        )
