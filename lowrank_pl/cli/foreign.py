"""Config folders named on the command line: files from elsewhere, which Hydra would follow wherever they lead.

Hydra finds them by a scheme of our own, so that whatever it loads from there, by whatever road, passes `Foreign`. What
they compose to is then compared with what the package composes alone: in Hydra's own settings nothing may differ.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.configs import flat
from lowrank_pl.reading import first_line, read_text, read_yaml
from lowrank_pl.run_files import read_facts

_BYTES = 2**17  # of a config file: ours have less than 2 KB
_VALUES = 5000
_BRANCHES = 10_000  # of defaults in defaults
_EXPANDED = 2**20  # characters, and 16 for each value
# what Hydra notes of the command line and of what it has read
_NOTED = re.compile(r"overrides\b|runtime\.(choices|config_sources)\b|job\.(config_name|override_dirname)$")
_REFERENCE = re.compile(r"\$\{(\w[\w.]*)\}")


class Foreign(ConfigSource):
    """A folder that Hydra reads configs from, within bounds: plain values and references, no settings of Hydra."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._branches: dict[str, int] = {}

    @staticmethod
    def scheme() -> str:
        return "foreign"

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises `ValueError` for a file in which somebody else would decide more than values."""
        file = self._file(config_path)
        text = read_text(file, _BYTES)
        if sum(1 for _ in flat(read_yaml(file, _BYTES))) > _VALUES:  # of which OmegaConf would take seconds
            raise ValueError(f"{file}: expected at most {_VALUES:,} values")
        try:
            config: Any = OmegaConf.load(io.StringIO(text))
            header = ConfigSource._get_header_dict(text[:512])  # so much of it Hydra reads
            plain: Any = OmegaConf.to_container(config, resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{file} is not a config ({first_line(error)})") from error
        if not isinstance(plain, dict):
            raise ValueError(f"{file}: expected a mapping")
        if "hydra" in plain or "hydra" in re.split(r"\W", f"{header['package'] or ''}/{config_path}"):
            raise ValueError(f"{file} changes settings of Hydra. If you wrote it, add --trust")
        _check_values(plain, file)
        self._branches[config_path] = max(1, len(plain.get("defaults") or ()))
        if math.prod(self._branches.values()) > _BRANCHES:
            raise ValueError(f"{file}: expected defaults that lead to at most {_BRANCHES:,} files")
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header=header)

    def available(self) -> bool:
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        return ".." not in config_path.split("/") and Path(f"{self.path}/{config_path}").is_dir()

    def is_config(self, config_path: str) -> bool:
        return ".." not in config_path.split("/") and self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        names: list[str] = []
        for name in sorted(os.listdir(f"{self.path}/{config_path}")):
            self._list_add_result(names, f"{config_path}/{name}".lstrip("/"), name, results_filter)
        return names

    def _file(self, config_path: str) -> Path:
        # not `Path / x`, which an absolute x would lead out of the folder
        return Path(f"{self.path}/{self._normalize_file_name(config_path)}")


class _Folders(SearchPathPlugin):
    """Where Hydra looks after the package's own configs."""

    places: ClassVar[list[str]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for place in self.places:
            search_path.append("the command line", place)


@contextmanager
def searching(folders: Sequence[Path], trusted: bool) -> Iterator[None]:
    """Inside, Hydra looks for configs in these folders too. Raises `ValueError` for what is no folder."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder}: expected a folder")
    for plugin in (Foreign, _Folders):
        Plugins.instance().register(plugin)
    before = _Folders.places
    _Folders.places = [f"{'file' if trusted else 'foreign'}://{folder.absolute()}" for folder in folders]
    try:
        yield
    finally:
        _Folders.places = before


def composed(name: str, words: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """The config that Hydra makes of overrides. Raises `ValueError`, also for whatever files from elsewhere lead Hydra
    into."""
    try:
        with initialize_config_module("lowrank_pl.conf", version_base="1.3"):
            return compose(name, list(words), return_hydra_config=with_hydra)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, HydraException) and not str(error) else error
        is_told = isinstance(cause, (ValueError, HydraException))
        raise ValueError(str(cause) if is_told else first_line(cause)) from error


def check_foreign(name: str, words: Sequence[str], allow: Sequence[str]) -> None:
    """Compose what a command line asks for, every job of it, and compare Hydra's settings with those of the package and
    the command line alone. Raises `ValueError` where the folders have a say in them, or call what is neither on the
    list nor in `allow`."""
    overrides = parsed(words)
    given = [override.input_line for override in overrides if override.is_hydra_override()]
    jobs = [[override.input_line for override in overrides if not override.is_sweep_override()]]
    configs = [composed(name, jobs[0], with_hydra=True)]  # first: what is wrong in a file is said with its name
    with searching([], trusted=True):
        own = composed("train", given, with_hydra=True).hydra
    if any(override.is_sweep_override() for override in overrides):
        sweeper = OmegaConf.to_container(own.sweeper)
        if not isinstance(sweeper, dict) or not str(sweeper["_target_"]).endswith(".BasicSweeper") or sweeper["params"]:
            raise ValueError("with --config-dir, expected Hydra's own sweeper. If you wrote the configs, add --trust")
        jobs += [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
        configs += [composed(name, job, with_hydra=True) for job in jobs[1:]]
    for job, config in zip(jobs, configs, strict=True):
        _compare(config.hydra, own, job)
        _check_expansion(OmegaConf.to_container(config, resolve=False))
        with open_dict(config):
            del config["hydra"]
        check_targets(config, allow)


def check_search_path(words: Sequence[str]) -> None:
    """Raise `ValueError` for an override by which Hydra finds configs past the options that are checked."""
    for override in parsed(words):
        if re.fullmatch(r"hydra([./]searchpath)?", override.key_or_group):
            raise ValueError(f"{override.input_line!r}: name a folder of configs by --config-dir, or add --trust")


def stored_links(folders: Sequence[Path], name: str) -> dict[str, str]:
    """Which values repeat others in the run whose stored config is named. Raises `ValueError` for no such names."""
    for folder in folders:
        file = folder / (name if name.endswith(".yaml") else f"{name}.yaml")
        facts = read_facts(file.parent) if file.is_file() else None
        if facts is not None:
            links: dict[str, str] = facts["links"]
            for key, source in links.items():
                if not re.fullmatch(r"(?!hydra\b)[a-z]\w*(\.\w+)*", key) or not isinstance(source, str):
                    raise ValueError(f"{file.parent / 'run.json'}: expected `links` between values but got {key!r}")
            return links
    return {}


def check_overrides(words: Sequence[str]) -> None:
    """Raise `ValueError` for overrides from a file that are more than values of the config."""
    for word in words:
        try:
            (override,) = parsed([word])
        except HydraException as error:
            raise ValueError(f"expected key=value but got {word!r}") from error
        names = re.split(r"\W", f"{override.key_or_group}@{override.package or ''}")
        if word.startswith("-") or "hydra" in names or "${" in word or override.is_sweep_override():
            raise ValueError(f"expected values of the config but got {word!r}. If you wrote it, add --trust")


def parsed(words: Sequence[str]) -> list[Any]:
    """Overrides by Hydra's grammar. Raises `ValueError` or `HydraException` for what is none."""
    try:
        overrides: list[Any] = OverridesParser.create().parse_overrides(list(words))
    except RecursionError as error:
        raise ValueError(f"expected key=value but got {max(words, key=len)[:40]!r}...") from error
    return overrides


def _check_values(plain: dict[Any, Any], file: Path) -> None:
    for key, value in flat(plain):
        # `${oc.env:...}`, which reads the environment, is what resolvers are
        if "${" in _REFERENCE.sub("", f"{key} {value}"):
            raise ValueError(
                f"{file}: expected `{key}` to be a value or ${{another.key}} but got {value!r}. If you wrote it, add "
                "--trust"
            )


def _compare(hydra: DictConfig, own: DictConfig, job: Sequence[str]) -> None:
    first, second = (dict(flat(OmegaConf.to_container(node, resolve=False))) for node in (hydra, own))
    changed = [key for key in {**first, **second} if first.get(key) != second.get(key) and not _NOTED.match(key)]
    if sorted([*hydra.overrides.hydra, *hydra.overrides.task]) != sorted(job):
        changed.append("overrides")
    if changed:
        raise ValueError(
            f"the configs in --config-dir change Hydra's `hydra.{changed[0]}`. If you wrote them, add --trust; one for "
            "--config-name begins with `defaults: [train, _self_]`"
        )


def _check_expansion(plain: Any) -> None:
    """References to references may stand for more than a memory holds."""
    known: dict[str, float] = {}

    def behind(key: str) -> float:
        if key not in known:
            known[key] = math.inf  # of one that leads to itself
            value = plain
            for part in key.split("."):
                if isinstance(value, dict):
                    value = value.get(part)
                elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                    value = value[int(part)]
            known[key] = size(value)
        return known[key]

    def size(value: Any) -> float:
        if isinstance(value, str):
            return 16 + len(value) + sum(map(behind, _REFERENCE.findall(value)))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 16 + sum(map(size, parts))

    try:
        total = size({key: value for key, value in plain.items() if key != "hydra"})
    except RecursionError:
        total = math.inf
    if total > _EXPANDED:
        raise ValueError("the configs in --config-dir refer to each other without end. If you wrote them, add --trust")
