"""Where a run of a config from elsewhere may write."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lowrank_pl.cli.configs import flat


def check_places(config: DictConfig, directory: Path, given: Collection[str]) -> None:
    """Raise `ValueError` for a key of a config from elsewhere by which files would be made outside of the run's
    directory and of the sweep that it is in: a stored `paths.references`, a `cache` of latencies, a place of a logger.

    Not for the keys `given` on the command line. A run that this user has started needs no such check: its config is
    signed (`Run.is_own`).
    """
    homes = [directory.resolve()]
    if (directory.parent / "sweep.json").is_file():
        homes.append(directory.parent.resolve())
    for key, value in sorted(flat(OmegaConf.to_container(config)), key=lambda pair: pair[0].count(".")):  # copies last
        if not isinstance(value, str) or key in given:
            continue
        if key == "paths.references" or key.endswith(".cache"):
            place = Path(value)
        elif key.startswith("logger.") and key != "logger._target_" and any(c in value for c in "/\\:"):
            place = Path("/") if ":" in value else directory / value
        else:
            continue
        if not any(_is_inside(place, home) for home in homes):
            raise ValueError(
                f"`{key}` is {value!r} in a config from elsewhere, outside of the run: if files may be written there, "
                f"add {key}={value}, or else {key}=null"
            )


def _is_inside(place: Path, home: Path) -> bool:
    try:
        return place.resolve().is_relative_to(home)
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no name at all
        return False


def has_default_root(config: DictConfig) -> bool:
    """Whether data are looked for, and so downloaded, where they are without any config."""
    default = Path(os.environ.get("LOWRANK_PL_DATA", "data")).expanduser().absolute()
    return bool(OmegaConf.select(config, "data.root") in (None, str(default)))
