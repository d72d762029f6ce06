"""`lowrank-pl train`: from a configuration to a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import build
from lowrank_pl.cli.configs import links, mirrored, resolved, stored
from lowrank_pl.cli.foreign import check_foreign, options_first, overrides_of, take_options
from lowrank_pl.cli.mistakes import check_words, told
from lowrank_pl.cli.schema import check_config
from lowrank_pl.cli.session import WHILE_BUILDING, WHILE_TRAINING, in_words, session
from lowrank_pl.runs import Run, execute


def main() -> None:
    """Build what the configuration names and run it."""
    allow, trusted = take_options(sys.argv)
    checked = False
    linked: dict[str, str] = {}
    if not trusted:
        try:
            checked, linked = check_foreign(sys.argv)
        except ValueError as error:
            sys.exit(f"lowrank-pl train: {error}")
    sys.argv[1:] = options_first(mirrored(sys.argv[1:], linked))
    words = overrides_of(sys.argv[1:])

    @hydra.main(config_path="pkg://lowrank_pl.conf", config_name="train", version_base="1.3")
    def train(config: DictConfig) -> None:
        _run(config, allow if checked else None, linked)

    with told("lowrank-pl train", words):
        if not _RUNS_NOTHING.intersection(sys.argv) and not any("config" in word for word in sys.argv):
            check_words(words, "train", several=bool({"-m", "--multirun"}.intersection(sys.argv)))
        train()


# Options with which Hydra shows something
_RUNS_NOTHING = {
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
}


def _run(config: DictConfig, allow: list[str] | None, linked: dict[str, str]) -> None:
    job = HydraConfig.get()
    with session() as stop:
        with _in_a_line(*WHILE_BUILDING):
            complete = resolved(config)
            if allow is not None:
                check_targets(complete, allow)
            check_config(complete)
            overrides, linked = list(job.overrides.task), {**linked, **links(config)}
            run = Run.start(job.runtime.output_dir, stored(complete), overrides, complete.seed, linked)
        with run.recorded():
            with _in_a_line(*WHILE_BUILDING):
                in_sweep = Path(job.sweep.dir) / "references" if job.mode == RunMode.MULTIRUN else None
                recipe = build(complete, complete.paths.references or in_sweep)
            with _in_a_line(*WHILE_TRAINING):
                execute(run, recipe, stop)


@contextmanager
def _in_a_line(*kinds: type[Exception]) -> Iterator[None]:
    """These errors without their trace, which HYDRA_FULL_ERROR=1 shows."""
    try:
        yield
    except kinds as error:
        raise CompactHydraException(in_words(error)) from error
