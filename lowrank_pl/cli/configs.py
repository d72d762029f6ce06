"""Configurations on disk: complete, and changed value by value."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lowrank_pl.reading import MEGABYTE, check_yaml, first_line, read_text

_PATHS = ("data.file", "data.root", "model.weights", "paths.data", "paths.references", "cost.cache")
_HEADER = {"defaults": [{"hydra": "default"}, "_self_"]}  # so that `train --config-dir RUN --config-name config` works
_PROTECTED = ("model", "data", "seed", "compression._target_", "compression.method", "decomposition", "metric",
              "compression.metric", "reconstruct.mode", "compression.reconstruct", "compression.train",
              "compression.initialize", "compression.norm_between")  # fmt: skip


def resolved(config: DictConfig) -> DictConfig:
    """A copy without references to anything, relative paths made absolute."""
    copied = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for key in _PATHS:
        value = OmegaConf.select(copied, key, throw_on_missing=False)
        if isinstance(value, str):
            OmegaConf.update(copied, key, str(Path(value).expanduser().absolute()))
    assert isinstance(copied, DictConfig)
    return copied


def links(config: DictConfig) -> dict[str, str]:
    """Which parts of a config repeat others: `{"compression.rank": "rank"}` for `rank: ${rank}`."""
    plain = flat(OmegaConf.to_container(config, resolve=False))
    found = {key: re.fullmatch(r"\$\{([\w.]+)\}", value) for key, value in plain if isinstance(value, str)}
    return {key: match[1] for key, match in found.items() if match}


def stored(config: DictConfig) -> str:
    """The text of a run's config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.merge(_HEADER, config))


def read_stored(file: Path) -> DictConfig:
    """A run's config.yaml. Raises `ValueError` for anything but plain values."""
    try:
        text = read_text(file, MEGABYTE)
        check_yaml(text, str(file))
        config: Any = OmegaConf.load(io.StringIO(text))
    except OSError:
        raise
    except Exception as error:
        said = first_line(error)
        raise ValueError(said if str(file) in said else f"{file} is not a config ({said})") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file}: expected a mapping")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    if plain.pop("defaults", _HEADER["defaults"]) != _HEADER["defaults"] or "hydra" in plain:
        raise ValueError(f"{file}: expected no settings of Hydra")
    for key, value in flat(plain):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{file}: expected `{key}` to be a plain value but got {value!r}")
    made: DictConfig = OmegaConf.create(plain)
    return made


def change(config: DictConfig, words: list[str], linked: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """Apply overrides `key=value` in place, to what repeats those values too; `{key: (old, new)}` of what changed."""
    before = dict(flat(OmegaConf.to_container(config)))
    for override in OverridesParser.create().parse_overrides(words):
        check_numbers(str(override.input_line))
        _check(config, override)
        for key in [override.key_or_group, *mirrors(override.key_or_group, linked)]:
            OmegaConf.update(config, key, override.value(), force_add=override.is_add())
    after = dict(flat(OmegaConf.to_container(config)))
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) or (key in before) != (key in after)
    }


def check_numbers(word: str) -> None:
    """Raise `ValueError` for an override with a number such as `1_0`, which Hydra takes for 10."""
    key, _, text = word.partition("=")
    for piece in re.split(r"[\s,:()\[\]{}]+", text):
        if "_" in piece and _is_number(piece):
            raise ValueError(
                f"Expected `{key.lstrip('+')}` to be a number without underscores but got {piece}: write "
                f"{piece.replace('_', '')}, or '{piece}' in quotes where it is text"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def mirrors(key: str, linked: dict[str, str]) -> list[str]:
    """The other keys under which this value stands."""
    return [
        copy + key[len(source) :] for copy, source in linked.items() if key == source or key.startswith(f"{source}.")
    ]


def mirrored(words: list[str], linked: dict[str, str]) -> list[str]:
    """A command line on which values that stand in several places are given for all of them."""
    more = []
    for word in words if linked else ():
        key, sign, value = word.partition("=")
        if sign and not key.startswith("-"):
            more += [f"{copy}={value}" for copy in mirrors(key, linked)]
    return [*words, *more]


def protected(changed: Iterable[str]) -> list[str]:
    """Those of the changed keys that make it another run."""
    return [key for key in changed if any(key == part or key.startswith(f"{part}.") for part in _PROTECTED)]


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and plain values."""
    if isinstance(values, (dict, list)) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flat(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], values


def close_to(key: str, names: Iterable[str]) -> str:
    """Up to three of the names that may have been meant, as the end of a message."""
    close = difflib.get_close_matches(key, list(names), 3, 0.6)
    return f"; close: {', '.join(close)}" if close else ""


def shown(value: Any) -> str:
    """A value as it would be written on a command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def options(group: str) -> list[str]:
    """The options that the package has for a group of its configuration; none where there is no such group."""
    folder = files("lowrank_pl.conf") / group
    if not group or not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _check(config: DictConfig, override: Override) -> None:
    key, word = override.key_or_group, override.input_line
    if override.is_delete() or override.is_sweep_override() or override.package is not None:
        raise ValueError(f"{word!r}: expected key=value; a stored run has one value for each key")
    known = key in dict(flat(OmegaConf.to_container(config))) or OmegaConf.select(config, key) is not None
    if isinstance(OmegaConf.select(config, key), DictConfig) and not isinstance(override.value(), dict):
        raise ValueError(
            f"{word!r}: `{key}` is a group, and a stored run's groups are fixed; change values such as "
            f"`{next(name for name, _ in flat(OmegaConf.to_container(config)) if name.startswith(key))}`, or start "
            "another run"
        )
    if not known and not override.is_add():
        names = [name for name, _ in flat(OmegaConf.to_container(config))]
        raise ValueError(f"{word!r}: the run's config has no `{key}`{close_to(key, names)}")
    if any(isinstance(value, str) and "${" in value for _, value in flat(override.value())):
        raise ValueError(f"{word!r}: expected `{key}` to be a plain value; a stored run's config refers to nothing")
