"""`lowrank-pl train`: from a configuration to a run."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_pl.cli.build import build
from lowrank_pl.cli.configs import links, resolved, stored
from lowrank_pl.cli.session import session
from lowrank_pl.runs import Run, execute


@hydra.main(config_path="pkg://lowrank_pl.conf", config_name="train", version_base="1.3")
def main(config: DictConfig) -> None:
    """Build what the configuration names and run it."""
    job, complete = HydraConfig.get(), resolved(config)
    with session() as stop:
        run = Run.start(
            job.runtime.output_dir, stored(complete), list(job.overrides.task), complete.seed, links(config)
        )
        in_sweep = Path(job.sweep.dir) / "references" if job.mode == RunMode.MULTIRUN else None
        with run.recorded():
            execute(run, build(complete, complete.paths.references or in_sweep), stop)
