"""Seconds, measured on this device."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from lowrank_pl.checks import check_int, check_number
from lowrank_pl.costs.base import StructureCost
from lowrank_pl.decompositions import Decomposition
from lowrank_pl.files import write_files
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import build
from lowrank_pl.reading import read_json
from lowrank_pl.structures import Rank
from lowrank_pl.timing import median_ms, run_all


@final
@dataclass(frozen=True)
class Latency(StructureCost):
    """Nanoseconds per batch on this device, so that lambda is in loss per millisecond.

    A structure is measured as a whole at `points` ranks from the least to the largest (per entry of the rank), once for
    every layer of the same shape, and interpolated in between; where a larger rank was measured faster, by noise or by
    luck, it is given the time of the smaller one. What was measured is kept in a file, `cache`, or by default one per
    device, number of threads and batch in the user's cache folder. `device` is a PyTorch device. Raises `ValueError`
    for a cache of other conditions.
    """

    batch: int = 1
    cache: str | None = None
    points: int = 6
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "points"):
            check_int(name, getattr(self, name), 1)
        torch.device(self.device)

    def __call__(self, layer: LayerSpec) -> float:
        key = json.dumps([layer.to_dict(), layer.inputs])
        return layer.share * self._remembered(key, lambda: self._measure(layer, [build(layer, bias=False)]))[0]

    def of_structure(self, layer: LayerSpec, decomposition: Decomposition, rank: Rank) -> float:
        """Of the layer as this structure: [1, full] in every entry of the rank."""
        grid = _grid(decomposition.least_rank(layer), decomposition.full_rank(layer), self.points)
        key = json.dumps([layer.to_dict(), layer.inputs, repr(decomposition), self.points])
        times = self._remembered(key, lambda: self._measure_grid(layer, decomposition, grid))
        return layer.share * _interpolate(grid, np.reshape(times, [len(axis) for axis in grid]), rank)

    def conditions(self) -> dict[str, Any]:
        """What the measured times hold for."""
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "batch": self.batch,
        }

    def check(self) -> None:
        """Raise `ValueError` if the cache was measured under other conditions, or is no such file."""
        self._read()

    def _path(self) -> Path:
        if self.cache is not None:
            return Path(self.cache)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_pl"
        words = "-".join(str(value) for value in self.conditions().values())
        return home / f"latency-{''.join(c if c.isalnum() else '-' for c in words)}.json"

    def _read(self) -> dict[str, list[float]]:
        path = self._path()
        if not path.is_file():
            return {}
        try:
            stored = read_json(path)
            conditions, times = dict(stored["conditions"]), dict(stored["nanoseconds"])
            for key, found in times.items():
                for time in found:
                    check_number(key, time, lambda x: 0 <= x < float("inf"), "nanoseconds")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Expected {path} to be a latency cache but it is not: remove it") from error
        if conditions != self.conditions():
            raise ValueError(
                f"The latency cache {path} was measured for {conditions}, but this is {self.conditions()}: give "
                "another `cache`, or remove the file to measure anew"
            )
        return times

    def _remembered(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        known = _tables(self)
        if key not in known:
            known.update(self._read())
        if key not in known:
            known[key] = measure()
            self._path().parent.mkdir(parents=True, exist_ok=True)
            stored = {"conditions": self.conditions(), "nanoseconds": {**self._read(), key: known[key]}}
            write_files({self._path(): json.dumps(stored, indent=1).encode()})
        return known[key]

    def _measure_grid(
        self, layer: LayerSpec, decomposition: Decomposition, grid: Sequence[Sequence[int]]
    ) -> list[float]:
        # from its factors where it could also run dense: the dense layer's time is known
        layouts = [decomposition.layout(layer, rank).of_factors() for rank in itertools.product(*grid)]
        modules = [layout.build(bias=False) for layout in layouts]
        times = np.reshape(self._measure(layer, modules), [len(axis) for axis in grid])
        for axis in range(times.ndim):
            times = np.maximum.accumulate(times, axis=axis)
        return [float(time) for time in times.ravel()]

    def _measure(self, layer: LayerSpec, modules: Sequence[nn.Module]) -> list[float]:
        if not layer.inputs:
            raise ValueError("Expected layers that have been seen to run: give `example_input`, or take cost='params'")
        inputs = [
            torch.randn(self.batch * vectors, layer.in_channels, *spatial, device=self.device)
            for vectors, *spatial in layer.inputs
        ]
        with torch.no_grad():
            calls = [partial(run_all, module.to(self.device).eval(), inputs) for module in modules]
            return [1e6 * ms for ms in median_ms(calls, torch.device(self.device).type, seconds=0.05, rounds=7)]


@cache
def _tables(latency: Latency) -> dict[str, list[float]]:
    """What this process has measured or read."""
    return {}


def _grid(least: Rank, full: Rank, points: int) -> list[list[int]]:
    """Per entry, up to so many ranks from the least, or from 1 on, to full, each about the same factor larger than the
    last; and 0 where that is the least."""
    ends = zip(least, full, strict=True)
    return [sorted({low, *(round(x) for x in np.geomspace(max(low, 1), most, points))}) for low, most in ends]


def _interpolate(grid: Sequence[Sequence[int]], values: Any, rank: Rank) -> float:
    """Linear in every entry of the rank."""
    for axis, r in zip(grid, rank, strict=True):
        values = np.apply_along_axis(partial(np.interp, r, axis), 0, values)
    return float(values)


def device_name(device: str) -> str:
    """What the machine calls it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
