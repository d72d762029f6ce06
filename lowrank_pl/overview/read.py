"""Runs found and read without trusting them: one that is odd says so, and spoils nothing for the others."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lowrank_pl.checksums import check_sum
from lowrank_pl.curves import read_curves
from lowrank_pl.overview.describe import group_of, method_of, shortened
from lowrank_pl.overview.entry import Entry
from lowrank_pl.reading import MEGABYTE, read_json, read_text, read_yaml
from lowrank_pl.run_files import is_running
from lowrank_pl.terminal import printable

DETAILED = 500  # of more runs than so many, layers, curves and configs are left out: the page is to stay usable
POINTS = 160  # of a curve on the page
LAYERS = 2_000
CURVES = frozenset({
    "lowrank/loss_before", "lowrank/loss_after", "lowrank/delta_w", "lowrank/gap", "lowrank/mu", "val/accuracy",
    "train/loss",
})  # fmt: skip
RANK = "lowrank/rank/"


def gather(directories: Iterable[str | Path]) -> list[Entry]:
    """All runs in these folders and below them, those of one group together, in the order of their cost.

    Links are not followed. Raises `FileNotFoundError` for a folder that is not there. What cannot be read is said in
    the entry.
    """
    found: dict[Path, str] = {}
    folders = [Path(directory).absolute() for directory in directories]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected folders of runs")
        for path, problem in _find(folder):
            found.setdefault(path, problem)
    entries = [
        Entry(path, _name(path, folders), problem=problem)
        if problem
        else _read(path, _name(path, folders), len(found) > DETAILED)
        for path, problem in found.items()
    ]
    return sorted(entries, key=lambda e: (e.group, e.value("compressed", "macs") or math.inf, _natural(e.name)))


def _find(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every directory with a run.json, whatever that is, and every one that cannot be looked into, with the reason."""
    waiting = [str(folder)]
    while waiting:  # no recursion: a tree can be deeper than Python's stack
        place, inner, is_run = waiting.pop(), [], False
        try:
            with os.scandir(place) as items:
                for item in items:
                    is_run = is_run or item.name == "run.json"
                    if item.is_dir(follow_symlinks=False):
                        inner.append(item.path)
        except OSError as error:
            yield Path(place), f"cannot be looked into: {error.strerror}"
            continue
        if is_run:
            yield Path(place), ""  # what lies in a run belongs to it
        else:
            waiting += sorted(inner, reverse=True)


def _read(path: Path, name: str, briefly: bool) -> Entry:
    entry = Entry(path, name)
    problems: list[str] = []
    for read in (_read_facts, _read_config, _read_report, _read_details):
        try:
            read(entry, problems.append, briefly)
        except Exception as error:  # whatever it is: the other files and the other runs are still shown
            problems.append(_reason(error, path))
    entry.problem = shortened("; ".join(dict.fromkeys(problems)), 300)
    return entry


def _read_facts(entry: Entry, doubt: Callable[[str], None], briefly: bool) -> None:
    facts = read_json(entry.directory / "run.json", MEGABYTE)
    if not isinstance(facts, dict) or not isinstance(facts.get("status"), str):
        raise ValueError("run.json: expected an object with a status")
    entry.status, entry.command = shortened(facts["status"], 40), shortened(str(facts.get("command", "")), 5_000)
    if entry.status == "running" and not is_running(entry.directory):
        entry.status = "stopped"
    if entry.has_failed:
        doubt(shortened(f"{entry.status}: {' '.join(str(facts.get('error') or 'no reason given').split())}", 120))


def _read_config(entry: Entry, doubt: Callable[[str], None], briefly: bool) -> None:
    config = read_yaml(entry.directory / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"config.yaml: expected a mapping but got {_shown(config)}")
    entry.group, entry.method = group_of(config), method_of(config)


def _read_report(entry: Entry, doubt: Callable[[str], None], briefly: bool) -> None:
    file = entry.directory / "report.json"
    if not os.path.lexists(file):
        return
    values = _Values("", read_json(file, 2 * MEGABYTE), doubt)
    check_sum(file)
    for network in ("dense", "compressed"):
        own = values.part(network)
        times = own.part("latency_ms")
        accuracy = own.number("accuracy", 1)
        numbers = {
            "error": None if accuracy is None else 100 * (1 - accuracy),
            **{quantity: own.number(quantity) for quantity in ("params", "macs")},
            **{f"latency_{batch}": times.number(batch) for batch in ("1", "32")},
        }
        if network == "compressed":
            bounds = values.part("speedup").part("32")
            numbers |= {f"speedup_32_{bound}": bounds.number(bound) for bound in ("low", "high")}
        if entry.status != "diverged":  # of which numbers mean nothing
            entry.numbers[network] = {name: number for name, number in numbers.items() if number is not None}
    layers = values.parts("layers")
    structures = {layer.text("structure") for layer in layers}
    known = [layer.number("response", least=0) for layer in layers if layer.text("structure") != "dense"]
    responses = [100 * error for error in known if error is not None]
    if responses and entry.numbers:
        entry.numbers["compressed"]["response"] = sum(responses) / len(responses)
    entry.is_all_dense = entry.method not in ("reference", "?") and structures == {"dense"}
    if not briefly:
        entry.layers = [_layer(layer) for layer in layers]


def _read_details(entry: Entry, doubt: Callable[[str], None], briefly: bool) -> None:
    if briefly:
        return
    entry.text = read_text(entry.directory / "config.yaml", MEGABYTE)[:20_000]
    entry.curves = read_curves(
        entry.directory / "metrics.csv", lambda name: name in CURVES or name.startswith(RANK), POINTS
    )


class _Values:
    """A mapping of a report; what is not as expected is doubted and left out."""

    def __init__(self, name: str, values: Any, doubt: Callable[[str], None]) -> None:
        self.name, self.doubt = name, doubt
        if values is not None and not isinstance(values, dict):
            doubt(f"report.json: expected {name or 'it'} to be a mapping but got {_shown(values)}")
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}

    def part(self, key: str) -> _Values:
        return _Values(self._name(key), self.values.get(key), self.doubt)

    def parts(self, key: str) -> list[_Values]:
        values = self.values.get(key)
        if values is not None and not isinstance(values, list):
            self.doubt(f"report.json: expected {self._name(key)} to be a list but got {_shown(values)}")
        values = values if isinstance(values, list) else []
        if len(values) > LAYERS:
            self.doubt(f"report.json: {len(values):,} {self._name(key)}, of which {LAYERS:,} are read")
        return [_Values(f"{self._name(key)}[{i}]", value, self.doubt) for i, value in enumerate(values[:LAYERS])]

    def number(self, key: str, most: float = 1e18, least: float = 1e-12) -> float | None:
        """Between 0 and `most`, counts stay ints; None where there is none."""
        value = self.values.get(key)
        if value is None or _is_number(value, most, least):
            return value
        self.doubt(f"report.json: expected {self._name(key)} to be a number from 0 to {most:g} but got {_shown(value)}")
        return None

    def numbers(self, key: str, most: int = 64) -> list[float]:
        values = self.values.get(key)
        if isinstance(values, list) and len(values) <= most and all(_is_number(value, least=0) for value in values):
            return values
        if values is not None:
            self.doubt(f"report.json: expected {self._name(key)} to be at most {most} numbers")
        return []

    def text(self, key: str) -> str:
        value = self.values.get(key)
        return "" if value is None else shortened(str(value), 200)

    def _name(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def _layer(layer: _Values) -> dict[str, Any]:
    """What the page shows of a layer."""
    pair = (layer.part("dense"), layer.part("compressed"))
    spectrum = layer.part("spectrum")
    points = zip(spectrum.numbers("index"), spectrum.numbers("value"), strict=False)
    return {
        **{key: layer.text(key) for key in ("name", "structure", "note")},
        **{key: [network.number(key) for network in pair] for key in ("macs", "params")},
        "response": layer.number("response", least=0),
        "spectrum": [list(point) for point in points],
    }


def _is_number(value: Any, most: float = 1e18, least: float = 1e-12) -> bool:
    # what is neither 0 nor of a size that anything here can have would spoil the axes for all
    return type(value) in (int, float) and (value == 0 or least <= value <= most)


def _shown(value: Any) -> str:
    return shortened(repr(value) if isinstance(value, (str, int, float)) else type(value).__name__, 40)


def _reason(error: Exception, path: Path) -> str:
    """In one line, files named by what they are in the run."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.path.basename(error.filename)}: {error.strerror}"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + (str(error).replace(f"{path}{os.sep}", "").splitlines() or ["no reason given"])[0]


def _name(path: Path, folders: list[Path]) -> str:
    """The run's path within the folder that was asked for."""
    folder = max((f for f in folders if path.is_relative_to(f)), key=lambda f: len(f.parts))
    inner = path.relative_to(folder)
    name = path.name if inner == Path() else str(inner if len(folders) == 1 else Path(folder.name) / inner)
    return printable(name)


def _natural(name: str) -> list[Any]:
    # every other part is one of digits; `isdigit` is also true of "²", of which `int` makes nothing
    parts = re.split(r"([0-9]+)", name)
    return [(int(text), "") if place % 2 else (-1, text) for place, text in enumerate(parts)]
