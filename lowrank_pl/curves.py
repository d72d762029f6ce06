"""The curves of a `metrics.csv`, read without trusting it. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
import math
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from lowrank_pl.reading import read_text

COLUMNS = 5_000


def read_curves(file: Path, wanted: Callable[[str], bool], most: int) -> dict[str, list[list[float]]]:
    """The wanted metrics as `[[step, value], ...]`, each thinned out to at most so many points.

    Without a file there are none; cells that are no finite number are left out. Raises `ValueError` or `OSError` for a
    file that cannot be read.
    """
    if not os.path.lexists(file):
        return {}
    curves: dict[str, tuple[array[float], array[float]]] = {}  # 16 bytes a point: lists would take 120
    try:
        lines = csv.reader(io.StringIO(read_text(file), newline=""))
        columns = next(lines, [])
        if len(columns) > COLUMNS:
            raise ValueError(f"{file}: expected at most {COLUMNS:,} columns but got {len(columns):,}")
        places = [(i, name) for i, name in enumerate(columns) if name not in ("step", "epoch") and wanted(name)]
        at = columns.index("step") if "step" in columns else len(columns)
        for row in lines:
            step = _number(row, at)
            for i, name in places if step is not None else ():
                value = _number(row, i)
                if value is not None:
                    steps, values = curves.setdefault(name, (array("d"), array("d")))
                    steps.append(step)  # type: ignore[arg-type]
                    values.append(value)
    except csv.Error as error:
        raise ValueError(f"{file} is not CSV ({error})") from error
    thin = {name: slice(None, None, -(-len(steps) // most)) for name, (steps, _) in curves.items()}
    return {
        name: [[step, value] for step, value in zip(steps[thin[name]], values[thin[name]], strict=True)]
        for name, (steps, values) in curves.items()
    }


def _number(row: Sequence[str], place: int) -> float | None:
    try:
        number = float(row[place])
    except (ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None
