"""A run as tables and pages show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Entry:
    """One run, in plain values of bounded size. What it has not come to is empty; `problem` says what could not be
    read, or why it failed.

    `numbers` has for `dense` and `compressed`: `error` in percent, `params`, `macs`, `latency_1`, `latency_32` in ms;
    for `compressed` maybe `response` in percent, the mean error of the outputs of its compressed layers, and
    `speedup_32_low`, `speedup_32_high`, between which the ratio of times lies.
    """

    directory: Path
    name: str
    status: str = "unknown"
    command: str = ""
    group: str = "? on ?"  # what it can be compared with: network and data
    method: str = "?"  # the kind of training and what identifies it, in short
    is_all_dense: bool = False  # a method was to compress the network, and no layer of it was
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    text: str = ""  # config.yaml
    layers: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    problem: str = ""

    @property
    def has_failed(self) -> bool:
        return self.status in ("failed", "diverged")

    @property
    def is_as_fast(self) -> bool:
        """Whether no difference was seen between the times of the two networks at batch 32."""
        low, high = (self.value("compressed", f"speedup_32_{bound}") for bound in ("low", "high"))
        return low is not None and high is not None and low <= 1 <= high

    def value(self, network: str, quantity: str) -> float | None:
        """One of the numbers; None where it is not known."""
        return self.numbers.get(network, {}).get(quantity)


def front(entries: Sequence[Entry], quantity: str = "macs") -> set[int]:
    """Positions of the entries that no other one of their group beats in both error and cost."""
    best: dict[str, float] = {}
    chosen = set()
    points = [
        (entry.group, cost, error, position)
        for position, entry in enumerate(entries)
        if (cost := entry.value("compressed", quantity))  # what costs nothing has not been counted
        and (error := entry.value("compressed", "error")) is not None
    ]
    for group, _, error, position in sorted(points):
        if error < best.get(group, math.inf):
            best[group] = error
            chosen.add(position)
    return chosen
