"""Where a run of a config from elsewhere may write."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lowrank_pl.cli.configs import flat


def check_places(config: DictConfig, directory: Path, given: Collection[str]) -> None:
    """Raise `ValueError` for a key of a stored config by which files would be made outside of the run's directory and
    of the sweep that it is in: a stored `paths.references`, a `cache` of latencies, a place of a logger.

    Not for the keys `given` on the command line. A run that this user has started needs no such check: its config is
    signed (`Run.is_own`).
    """
    homes = [directory.resolve()]
    if (directory.parent / "sweep.json").is_file():
        homes.append(directory.parent.resolve())
    for key, value in flat(OmegaConf.to_container(config)):
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
                f"`{key}` of the stored config is {value!r}, outside of the run, which was not started by you here: if "
                f"files may be written there, add {key}={value}, or else {key}=null"
            )


def _is_inside(place: Path, home: Path) -> bool:
    try:
        return place.resolve().is_relative_to(home)
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no name at all
        return False
