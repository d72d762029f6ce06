"""Mistakes on a command line, found before anything runs, and said in one line that names the key."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import _locate
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import check_parts
from lowrank_pl.cli.changes import given_keys
from lowrank_pl.cli.configs import check_numbers, close_to, flat, links, options, resolved, shown
from lowrank_pl.cli.places import check_places
from lowrank_pl.cli.schema import arguments, check_config, nodes
from lowrank_pl.cli.session import WHILE_BUILDING, in_words, quiet


@contextmanager
def told(command: str, words: Sequence[str]) -> Iterator[None]:
    """Inside, Hydra runs: what it cannot compose, and what is raised for it to show, ends the command with one line.

    HYDRA_FULL_ERROR=1, with which Hydra leaves errors alone, shows their trace.
    """
    if asks_for_trace():
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        sys.exit(f"{command}: {explain(error, words)}")
    except OSError as error:  # those of a run have become a HydraException: this is about its directory
        sys.exit(f"{command}: `hydra.run.dir`: {error}")
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def asks_for_trace() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR", "0") != "0"


def check_words(
    words: Sequence[str],
    name: str,
    several: bool = False,
    allow: Sequence[str] | None = None,
    check: Callable[[DictConfig, set[str]], None] = lambda config, keys: check_parts(config),
) -> None:
    """Compose what a command line asks for and check it, before there is a directory of a run.

    With `several`, the overrides are a grid, of which every value is tried once. `allow` is given where others wrote
    configs (see `check_targets`). `check` gets each config that is complete, and the keys of the command line, at the
    end. Raises `ValueError` with the key.
    """
    quiet()
    overrides = list(_parsed(words))
    for override in overrides:
        check_numbers(str(override.input_line))
        is_place = override.key_or_group in ("hydra.run.dir", "hydra.sweep.dir")
        if is_place and (not override.value() or str(override.value()).startswith("~")):  # which is a name like others
            raise ValueError(
                f"Expected `{override.key_or_group}` to be a folder's whole name but got {override.input_line!r}"
            )
    jobs = [list(words)]
    if several:
        try:
            jobs = [job for jobs in BasicSweeper.split_arguments(overrides, None) for job in jobs]
        except HydraException:  # for another sweeper, which has its own ways
            return
    seen: set[str] = set()
    for job in jobs:
        if not seen.issuperset(job):
            seen.update(job)
            _check_job(job, name, allow, check)


def _check_job(
    words: list[str], name: str, allow: Sequence[str] | None, check: Callable[[DictConfig, set[str]], None]
) -> None:
    try:
        with initialize_config_module("lowrank_pl.conf", version_base="1.3"):
            config = compose(name, words, return_hydra_config=True)
        with open_dict(config):
            config.hydra.runtime.cwd = os.getcwd()  # which paths refer to
            HydraConfig.instance().set_config(config)
            directory = Path(config.hydra.run.dir).absolute()
            with read_write(config.hydra.runtime):
                config.hydra.runtime.output_dir = str(directory)
            HydraConfig.instance().set_config(config)
            del config["hydra"]
        given = given_keys(words, links(config))
        plain = resolved(config)
        if allow is not None:
            check_targets(plain, allow)
            check_places(plain, directory, given)
        check_config(plain)
        check(plain, given)
    except (HydraException, *WHILE_BUILDING) as error:
        raise ValueError(explain(error, words)) from error


def explain(error: BaseException, words: Sequence[str]) -> str:
    """The line for an error that came out of composing these overrides."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r}: expected key=value; quote a value that has special signs: 'key=\"~/a, b\"'"
    for override in _parsed(words):
        if override.is_sweep_override():
            continue
        group, value = override.key_or_group, override.value()
        if not group:
            return f"{override.input_line!r}: expected key=value"
        if options(group) and not override.is_delete() and not isinstance(value, (str, list)):
            return f"Expected `{group}` to be one of {', '.join(options(group))} but got {shown(value)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        close = close_to(name, error.options)
        return f"Expected `{group}` to be one of {', '.join(error.options)} but got {name!r}{close}"
    unknown = re.match(r"Could not override '(.+?)'.\n", str(error))
    return in_words(error).partition(" Config search path:")[0] if unknown is None else _unknown(unknown[1], words)


def _unknown(key: str, words: Sequence[str]) -> str:
    group, _, rest = key.partition(".")
    having = [name for name in options(group) if rest in _keys_of(group, name)]
    if having:
        return f"`{key}`: there is no such key with the chosen `{group}`; it belongs to {group}={' or '.join(having)}"
    known, possible = _names([word for word in words if word.lstrip("+~").partition("=")[0] != key])
    if key in possible:
        return f"`{key}`: the config does not have it yet; add it by +{key}=..."
    names = [*known, *possible] if rest else [name.partition(".")[0] for name in known]
    return f"`{key}`: there is no such key{close_to(key, dict.fromkeys(names))}"


def _keys_of(group: str, option: str) -> set[str]:
    text = (files("lowrank_pl.conf") / group / f"{option}.yaml").read_text()
    return {key for key, _ in flat(OmegaConf.to_container(OmegaConf.create(text), resolve=False))}


def _names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys that there are without the wrong one, and those that could be added."""
    try:
        with initialize_config_module("lowrank_pl.conf", version_base="1.3"):
            values: Any = OmegaConf.to_container(compose("train", list(words)), resolve=False)
        check_targets(values)  # what is looked up below is imported
    except (HydraException, OmegaConfBaseException, ValueError):
        return [], []
    found = [(key, arguments(_locate(node["_target_"]))[0]) for key, node in nodes(values)]
    return [key for key, _ in flat(values)], [f"{key}.{name}" for key, names in found for name in names]


def _parsed(words: Sequence[str]) -> Iterator[Override]:
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            continue
        yield override
