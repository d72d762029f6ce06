"""`lowrank-pl train`: from a configuration to a run."""

from __future__ import annotations

import logging
import warnings

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lowrank_pl.models import load_weights
from lowrank_pl.module import Classifier
from lowrank_pl.runs import Run, execute


@hydra.main(config_path="pkg://lowrank_pl.conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    """Build what the configuration names and run it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # the run's own directory
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning with a newer PyTorch
    overrides = list(HydraConfig.get().overrides.task)
    run = Run.start(config.paths.run, OmegaConf.to_yaml(config, resolve=True), overrides, config.seed)
    with run.recorded():
        pl.seed_everything(config.seed, verbose=False)
        data = instantiate(config.data, _convert_="all")
        data.setup()
        net = instantiate(config.model.net, input_shape=data.input_shape, num_classes=data.num_classes)
        if config.model.weights is not None:
            load_weights(net, config.model.weights)
        module = Classifier(
            net,
            instantiate(config.optimizer, _convert_="all"),
            instantiate(config.scheduler, _convert_="all"),
            config.channels_last,
            config.label_smoothing,
        )
        trainer = instantiate(config.trainer, _partial_=True, _convert_="all")
        compression = instantiate(config.compression, _convert_="all") or None
        execute(run, module, data, trainer, compression, instantiate(config.logger, _convert_="all"))
