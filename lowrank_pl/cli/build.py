"""From a configuration to what a run is made of."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.callbacks import AlternatingCallback, CompressionCallback
from lowrank_pl.cli.configs import flat
from lowrank_pl.models import load_weights
from lowrank_pl.planning import make_plan
from lowrank_pl.run_files import key_of
from lowrank_pl.runs import OneShot, Recipe, Training
from lowrank_pl.targets import check_patterns


def build(config: DictConfig, references: str | Path | None) -> Recipe:
    """What the configuration describes, ready to run; `references` is where trained references are shared."""
    check_parts(config)
    make = partial(instantiate, _convert_="all")
    pl.seed_everything(config.seed, verbose=False)
    data = make(config.data)
    data.setup()
    net = make(config.model.net, input_shape=data.input_shape, num_classes=data.num_classes)
    if config.model.weights is not None:
        load_weights(net, config.model.weights)
    compression = _compression(config)
    reference = _training(config.reference) if config.model.weights is None else None
    if reference is not None and not (reference.always or isinstance(compression, (AlternatingCallback, OneShot))):
        reference = None
    _check_patterns(net, compression)
    return Recipe(
        data,
        net,
        Training(make(config.optimizer), make(config.scheduler), product_decay=config.get("product_decay", 0.0)),
        make_trainer=make(config.trainer, _partial_=True),
        make_logger=make(config.logger, _partial_=True) if config.logger else None,
        compression=compression,
        reference=reference,
        finetune=_training(config.finetune),
        references=None if references is None else Path(references).absolute(),
        reference_key=_reference_key(config),
        seed=config.seed,
        channels_last=config.channels_last,
        label_smoothing=config.label_smoothing,
        report_train=config.report_train,
        checkpoint_every=config.checkpoint_every,
        hyperparameters=dict(flat(OmegaConf.to_container(config))),
    )


def check_parts(config: DictConfig) -> None:
    """Make, for nothing, all that is cheap to make: what is wrong with it is known before hours of training.

    Raises what `build` raises.
    """
    for key in ("devices", "num_nodes"):
        if config.trainer.get(key, 1) != 1:
            raise ValueError(
                f"Expected `trainer.{key}` to be 1 but got {config.trainer[key]}: the command line trains on one "
                "device. On several, use the callbacks in a Trainer of your own"
            )
    make = partial(instantiate, _convert_="all")
    # the first four may be unused
    for group in ("decomposition", "rank", "cost", "targets", "data"):
        make(config.get(group))
    compression = _compression(config)
    trainer = make(config.trainer, logger=False, enable_checkpointing=False)
    is_endless = trainer.max_epochs == -1 and trainer.max_steps == -1
    for prefix in ("", "reference.", "finetune."):
        own = isinstance(compression, AlternatingCallback) or (
            isinstance(compression, OneShot) and not compression.train
        )
        lengths = [OmegaConf.select(config, f"{prefix}{key}") for key in ("epochs", "phases")]
        has_length = any(lengths) if prefix else own
        _try_out(config, prefix, math.inf if is_endless and not has_length else 2)


def _compression(config: DictConfig) -> CompressionCallback | OneShot | None:
    """Up to 0.2, `compression=direct` was `compress` with its arguments. Raises `ValueError` with the key."""
    made = instantiate(config.compression, _convert_="all") or None
    if isinstance(made, partial):
        return OneShot(**made.keywords, train=True)
    try:
        trained = bool(config.reference) or config.model.weights is not None
        return made.settled(trained) if isinstance(made, OneShot) else made
    except ValueError as error:
        raise ValueError(f"`compression`: {error}") from error


def _check_patterns(net: nn.Module, compression: CompressionCallback | OneShot | None) -> None:
    """Raise `ValueError` for names of layers that the network does not have."""
    module = nn.ModuleDict({"net": net})  # as in a `Classifier`
    try:
        if isinstance(compression, CompressionCallback):
            make_plan(module, compression.method, compression.rank, compression.targets)
            most = getattr(compression.rank, "most", None)
            patterns = [pattern for pattern, _ in most] if isinstance(most, tuple) else []
            check_patterns(patterns, find_maps(module), "most")
        elif compression is not None:
            make_plan(module, compression.method, compression.rank, compression.targets)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`compression`: {error}") from error


def _try_out(config: DictConfig, prefix: str, total_steps: float) -> None:
    """Make an optimizer and its schedule. Raises `ValueError` with the key."""
    optimizer, parameter = None, nn.Parameter(torch.zeros(2, 2))
    for key in (f"{prefix}optimizer", f"{prefix}scheduler"):
        make = instantiate(OmegaConf.select(config, key), _convert_="all")
        try:
            if optimizer is None:
                optimizer = make([parameter]) if make else None
            elif make:
                make(optimizer, total_steps=total_steps, steps_per_epoch=1)
        except Exception as error:
            raise ValueError(f"`{key}`: {error}") from error


def _training(config: DictConfig) -> Training | None:
    return instantiate(config, _convert_="all") or None


def _reference_key(config: DictConfig) -> str:
    """Of everything that a reference network depends on."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    parts = ("model", "data", "seed", "reference", "trainer", "channels_last", "label_smoothing")
    return key_of([values[part] for part in parts])
