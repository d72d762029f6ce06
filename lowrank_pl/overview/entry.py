"""What a run's directory holds, read without trusting it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowrank_pl.run_files import is_running, read_facts

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
POINTS = 160  # of a curve on the page
_KINDS = {"DeepTwist": "deeptwist", "LearningCompression": "lc", "compress": "direct"}


@dataclass
class Entry:
    """One run. `report` and `curves` are empty where it has not come so far; `problem` says what could not be read."""

    directory: Path
    name: str
    status: str = "unknown"
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    problem: str = ""

    @property
    def group(self) -> str:
        """What it can be compared with: network and data."""
        model = _get(self.config, "model", "net")
        name = _class(model)
        if "depth" in model:
            name = re.sub(r"^Cifar|$", lambda m: "" if m[0] else str(model["depth"]), name)
        elif isinstance(model.get("name"), str):
            name = model["name"]
        data = _get(self.config, "data")
        source = Path(str(data["file"])).stem if data.get("file") else _class(data)
        return f"{name} on {source}"

    @property
    def method(self) -> str:
        """The kind of training and what identifies it, in short."""
        compression = _get(self.config, "compression")
        kind = {"DeepTwist": "deeptwist", "LearningCompression": "lc", "compress": "direct"}.get(
            _class(compression), "none"
        )
        if kind == "none":
            return "reference"
        structure = compression.get("method")
        if isinstance(structure, dict):
            structure = _snake(_class(structure)) if "_target_" in structure else "mixed"
        words = [kind, str(structure)]
        if kind == "lc" and compression.get("lambda_") is not None:
            words.append(f"lambda={_short(compression['lambda_'])}")
        for part in ("rank", "budget"):
            rule = compression.get(part)
            if isinstance(rule, dict) and "_target_" in rule:
                numbers = [_short(v) for v in rule.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
                words += [_snake(_class(rule)), *numbers]
        if kind == "deeptwist" and "S_D" in compression:
            words.append(f"S_D={compression['S_D']}")
        return " ".join(words)

    @property
    def is_all_dense(self) -> bool:
        """Whether a method was to compress the network, and no layer of it was."""
        layers = self.report.get("layers")
        if self.method == "reference" or not isinstance(layers, list) or not layers:
            return False
        return all(_get(layer).get("structure") == "dense" for layer in layers)

    def value(self, network: str, quantity: str) -> float | None:
        """Of `dense` or `compressed`: `error` in percent, `params`, `macs`, `latency_1` or `latency_32` in ms."""
        part = _get(self.report, network)
        if quantity.startswith("latency_"):
            part, quantity = _get(part, "latency_ms"), quantity.removeprefix("latency_")
        number = part.get("accuracy" if quantity == "error" else quantity)
        if number is None or not _is_number(number):
            return None
        value: float = 100 * (1 - number) if quantity == "error" else number  # counts stay ints
        return value


def gather(directories: Iterable[str | Path]) -> list[Entry]:
    """All runs in these folders and below them, those of one group together, in the order of their cost.

    Raises `FileNotFoundError` for a folder that is not there. What cannot be read is said in the entry.
    """
    found: dict[Path, Entry] = {}
    folders = [Path(directory).absolute() for directory in directories]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected folders of runs")
        for place, inner, files in os.walk(folder):
            inner.sort()
            if "run.json" in files:
                inner.clear()  # what lies in a run belongs to it
                path = Path(place)
                found.setdefault(path, _read(path, _name(path, folders)))
    return sorted(found.values(), key=lambda e: (e.group, e.value("compressed", "macs") or math.inf, _natural(e.name)))


def front(entries: Sequence[Entry], quantity: str = "macs") -> set[int]:
    """Positions of the entries that no other one of their group beats in both error and cost."""
    best: dict[str, float] = {}
    chosen = set()
    points = [
        (entry.group, cost, error, position)
        for position, entry in enumerate(entries)
        if (cost := entry.value("compressed", quantity)) is not None
        and (error := entry.value("compressed", "error")) is not None
    ]
    for group, _, error, position in sorted(points):
        if error < best.get(group, math.inf):
            best[group] = error
            chosen.add(position)
    return chosen


def _read(path: Path, name: str) -> Entry:
    entry = Entry(path, name)
    try:
        facts = read_facts(path)
        assert facts is not None
        entry.status, entry.command = facts["status"], str(facts.get("command", ""))
        if entry.status == "running" and not is_running(path):
            entry.status = "stopped"
        if entry.status == "failed" and facts.get("error"):
            entry.problem = f"failed: {' '.join(str(facts['error']).split())}"[:120]
        entry.text = (path / "config.yaml").read_text()
        config = yaml.load(entry.text, _LOADER)
        entry.config = config if isinstance(config, dict) else {}
        if (path / "report.json").is_file():
            report = json.loads((path / "report.json").read_text())
            entry.report = report if isinstance(report, dict) else {}
        entry.curves = _curves(path / "metrics.csv")
    except (OSError, ValueError, yaml.YAMLError, RecursionError, csv.Error) as error:
        entry.problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return entry


def _curves(file: Path) -> dict[str, list[list[float]]]:
    """Every metric as `[[step, value], ...]`, thinned out to what a page can show."""
    curves: dict[str, list[list[float]]] = {}
    if not file.is_file():
        return curves
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            for name, text in row.items():
                if text and name not in ("step", "epoch", None):
                    try:
                        point = [float(row["step"]), float(text)]
                    except (ValueError, KeyError, TypeError):
                        continue
                    if all(map(math.isfinite, point)):
                        curves.setdefault(name, []).append(point)
    return {name: points[:: -(-len(points) // POINTS)] for name, points in curves.items()}


def _name(path: Path, folders: list[Path]) -> str:
    """The run's path within the folder that was asked for."""
    folder = max((f for f in folders if path.is_relative_to(f)), key=lambda f: len(f.parts))
    inner = path.relative_to(folder)
    return path.name if inner == Path() else str(inner if len(folders) == 1 else Path(folder.name) / inner)


def _get(values: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _class(values: dict[str, Any]) -> str:
    return str(values.get("_target_", "?")).rpartition(".")[2]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _short(number: Any) -> str:
    return f"{number:g}" if _is_number(number) else str(number)


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
