"""What a run is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.callbacks import CompressionCallback
from lowrank_pl.module import Classifier, check_product_decay
from lowrank_pl.runs.one_shot import OneShot


@dataclass(frozen=True)
class Training:
    """How a network is trained: what makes its optimizer and schedule, and for how many epochs (None: the trainer's).

    With `always`, a reference is trained also for methods that could start from untrained weights. `product_decay` is
    weight decay on the weights that layers deploy as: on the product where a layer is factors.
    """

    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None = None
    epochs: int | None = None
    always: bool = False
    product_decay: float = 0.0

    def __post_init__(self) -> None:  # before anything is trained: a fine-tuning may be hours away
        check_product_decay(self.product_decay)


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
            training.scheduler,
            self.channels_last,
            self.label_smoothing,
            training.product_decay,
        )
