"""`lowrank-pl train`: from a configuration to a run."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lowrank_pl.callbacks import LearningCompression
from lowrank_pl.models import load_weights
from lowrank_pl.runs import Recipe, Run, Training, execute, key_of


@hydra.main(config_path="pkg://lowrank_pl.conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    """Build what the configuration names and run it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # the run's own directory
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning with a newer PyTorch
    job = HydraConfig.get()
    run = Run.start(config.paths.run, OmegaConf.to_yaml(config, resolve=True), list(job.overrides.task), config.seed)
    in_sweep = Path(job.sweep.dir) / "references" if job.mode == RunMode.MULTIRUN else None
    with run.recorded():
        execute(run, build(config, config.paths.references or in_sweep))


def build(config: DictConfig, references: str | Path | None) -> Recipe:
    """What the configuration describes, ready to run; `references` is where trained references are shared."""
    make = partial(instantiate, _convert_="all")
    pl.seed_everything(config.seed, verbose=False)
    data = make(config.data)
    data.setup()
    net = make(config.model.net, input_shape=data.input_shape, num_classes=data.num_classes)
    if config.model.weights is not None:
        load_weights(net, config.model.weights)
    compression = make(config.compression) or None
    reference = _training(config.reference) if config.model.weights is None else None
    if reference is not None and not (reference.always or isinstance(compression, (LearningCompression, partial))):
        reference = None
    return Recipe(
        data,
        net,
        Training(make(config.optimizer), make(config.scheduler)),
        make_trainer=make(config.trainer, _partial_=True),
        make_logger=make(config.logger, _partial_=True),
        compression=compression,
        reference=reference,
        finetune=_training(config.finetune),
        references=None if references is None else Path(references).absolute(),
        reference_key=_reference_key(config),
        seed=config.seed,
        channels_last=config.channels_last,
        label_smoothing=config.label_smoothing,
        report_train=config.report_train,
    )


def _training(config: DictConfig) -> Training | None:
    return instantiate(config, _convert_="all") or None


def _reference_key(config: DictConfig) -> str:
    """Of everything that a reference network depends on."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    parts = ("model", "data", "seed", "reference", "trainer", "channels_last", "label_smoothing")
    return key_of([values[part] for part in parts])
