"""`lowrank-pl train`: from a configuration to a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_pl.cli.build import build
from lowrank_pl.cli.changes import given_keys, without_effect
from lowrank_pl.cli.configs import links, mirrored, resolved, stored
from lowrank_pl.cli.foreign import check_foreign, check_search_path, searching, stored_links
from lowrank_pl.cli.mistakes import asks_for_trace, check_words, explain, told
from lowrank_pl.cli.places import has_default_root
from lowrank_pl.cli.schema import check_config
from lowrank_pl.cli.session import WHILE_BUILDING, WHILE_TRAINING, in_words, session
from lowrank_pl.data.downloads import no_downloads
from lowrank_pl.runs import Diverged, Recipe, Run, execute
from lowrank_pl.terminal import printable, say

# Hydra's own options that we pass on.
_FLAGS = (("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",), ("--run", "-r"), ("--multirun", "-m"),
          ("--shell-completion", "-sc"))  # fmt: skip
_VALUES = (("--cfg", "-c"), ("--package", "-p"))
_SHOWS = ("help", "hydra_help", "version", "shell_completion", "cfg", "info")  # without running anything
# One finds configs past our check, the other one opens a pickle.
_REFUSED = (("--config-path", "-cp"), ("--experimental-rerun",))


def main() -> None:
    """Build what the configuration names and run it."""
    given = _given()
    folders = [Path(folder) for folder in given.config_dir]
    is_foreign = bool(folders) and not given.trust
    made: list[tuple[DictConfig, Recipe]] = []
    try:
        linked = stored_links(folders, given.config_name)
        words = mirrored(given.overrides, linked)
        if not given.trust:
            check_search_path(words)
        with searching(folders, given.trust):
            if is_foreign:
                check_foreign(given.config_name, words, given.allow)
            if not any(vars(given)[name] for name in _SHOWS):
                made = _checked(given, words, is_foreign)
    except HydraException as error:
        sys.exit(f"lowrank-pl train: {explain(error, given.overrides)}")
    except (ValueError, OSError) as error:
        sys.exit(f"lowrank-pl train: {error}")
    sys.argv[1:] = [*_passed_on(given), f"--config-name={given.config_name}", *words]

    @hydra.main(config_path="pkg://lowrank_pl.conf", config_name="train", version_base="1.3")
    def train(config: DictConfig) -> None:
        try:
            _run(config, linked, made, is_foreign)
        except (CompactHydraException, Diverged) as error:  # not left to Hydra, which says more, and ends other jobs
            if shows_trace:
                raise
            sys.stderr.write(printable(f"lowrank-pl train: {error}") + "\n")
            codes.append(3 if isinstance(error, Diverged) else 1)

    shows_trace, codes = asks_for_trace(), [0]
    with searching(folders, given.trust), told("lowrank-pl train", words):
        train()
    sys.exit(max(codes))


def _given() -> argparse.Namespace:
    # without abbreviations: what is checked and what is passed on are the same words
    usage = "lowrank-pl train [GROUP=OPTION ...] [KEY=VALUE ...] [options]; --help says more"
    parser = argparse.ArgumentParser(prog=sys.argv[0], usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names in _FLAGS:
        parser.add_argument(*names, action="store_true")
    for names in (*_VALUES, *_REFUSED):
        parser.add_argument(*names)
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--config-name", "-cn", default="train")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--trust", action="store_true")
    given = parser.parse_intermixed_args()
    for name, *_ in _REFUSED:
        if vars(given)[name[2:].replace("-", "_")] is not None:
            parser.error(f"{name} is not supported: name a folder of configs by --config-dir, a run by `resume`")
    return given


def _passed_on(given: argparse.Namespace) -> list[str]:
    chosen = vars(given)
    flags = [name for name, *_ in _FLAGS if chosen[name[2:].replace("-", "_")]]
    values = [f"{name}={chosen[name[2:]]}" for name in ("--cfg", "--package", "--info") if chosen[name[2:]] is not None]
    return [*flags, *values]


def _checked(given: argparse.Namespace, words: list[str], is_foreign: bool) -> list[tuple[DictConfig, Recipe]]:
    """What a single run is made of, before it has a directory; the jobs of several make theirs later."""
    made: list[tuple[DictConfig, Recipe]] = []

    def make(config: DictConfig, keys: set[str]) -> None:
        made.append((config, _recipe(config, keys, is_foreign)))

    allow = given.allow if is_foreign else None
    if given.multirun:
        check_words(words, given.config_name, several=True, allow=allow)
    else:
        check_words(words, given.config_name, allow=allow, check=make)
    return made


def _recipe(config: DictConfig, keys: Collection[str], is_foreign: bool, references: Path | None = None) -> Recipe:
    """`keys` are those of the command line: a config from elsewhere does not say where data are downloaded to."""
    asked = not is_foreign or "data.root" in keys or has_default_root(config)
    with nullcontext() if asked else no_downloads():
        return build(config, config.paths.references or references)


def _run(config: DictConfig, linked: dict[str, str], made: list[tuple[DictConfig, Recipe]], is_foreign: bool) -> None:
    job = HydraConfig.get()
    with session() as stop:
        with _in_a_line(*WHILE_BUILDING):
            complete = resolved(config)
            check_config(complete)
            overrides, linked = list(job.overrides.task), {**linked, **links(config)}
            run = Run.start(job.runtime.output_dir, stored(complete), overrides, complete.seed, linked)
        try:
            with run.recorded():
                with _in_a_line(*WHILE_BUILDING):
                    if made and made[0][0] == complete and job.mode == RunMode.RUN:
                        _, recipe = made.pop()
                    else:  # a job of several, or the configs say what time it is
                        in_sweep = Path(job.sweep.dir) / "references" if job.mode == RunMode.MULTIRUN else None
                        recipe = _recipe(complete, given_keys(overrides, linked), is_foreign, in_sweep)
                for key, reason in without_effect(given_keys(overrides, linked), complete).items():
                    say(f"{key} {reason}")
                with _in_a_line(*WHILE_TRAINING):
                    execute(run, recipe, stop)
        except Exception:
            say(f"What there is of the run is in {run.directory}")
            raise


@contextmanager
def _in_a_line(*kinds: type[Exception]) -> Iterator[None]:
    """These errors without their trace, which HYDRA_FULL_ERROR=1 shows."""
    try:
        yield
    except kinds as error:
        raise CompactHydraException(in_words(error)) from error
