"""Seconds, measured so that they can be compared and believed, and memory."""

from __future__ import annotations

import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDS = 21


def times_ms(
    functions: Sequence[Callable[[], Any]], device: str = "cpu", seconds: float = 0.1, rounds: int = ROUNDS
) -> list[list[float]]:
    """Milliseconds of each function in each round, timed in turns, so that a busy machine slows all alike. In an order
    drawn anew for each round: which of two equal functions is faster in a round is then a fair coin, independent of all
    others, however the machine behaves. All are called equally often in a round: the slowest one takes about `seconds`
    in all, at least one call per round; fewer rounds, but five, where the machine has become ten times slower
    meanwhile."""
    slowest = max(_seconds_of_a_call(function, seconds / rounds, device) for function in functions)
    count = max(1, round(seconds / rounds / slowest))
    times: list[list[float]] = [[] for _ in functions]
    order = random.Random(0)
    end = time.perf_counter() + 10 * rounds * count * slowest * len(functions)
    for i in range(rounds):
        if i >= 5 and time.perf_counter() > end:
            break
        turns = list(zip(functions, times, strict=True))
        for function, kept in order.sample(turns, len(turns)):
            kept.append(1e3 * _seconds(function, count, device) / count)
    return times


def median_ms(
    functions: Sequence[Callable[[], Any]], device: str = "cpu", seconds: float = 0.1, rounds: int = ROUNDS
) -> list[float]:
    """The median of `times_ms` over the rounds, of each function."""
    return [statistics.median(kept) for kept in times_ms(functions, device, seconds, rounds)]


def run_all(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A layer on all that it is called with, one call after another: what is timed of it."""
    for x in inputs:
        module(x)


def _seconds_of_a_call(function: Callable[[], Any], enough: float, device: str) -> float:
    """By calls that take a quarter of `enough`, or one. The first ones warm it up."""
    _seconds(function, 1, device)
    count = 1
    while (taken := _seconds(function, count, device)) < enough / 4:  # at the first time for all that are slow
        count *= 2
    return taken / count


def _seconds(function: Callable[[], Any], count: int, device: str) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


@final
@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median over rounds, and bounds between which the true median lies with a probability
    of 99.9 %, whatever the distribution (order statistics; of fewer than 11 rounds, the least and the largest)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> Ratio:
        """Of times, round by round."""
        ratios = sorted(a / b for a, b in zip(before, after, strict=True))
        outside = _outside(len(ratios))
        return cls(statistics.median(ratios), ratios[outside], ratios[-1 - outside])

    @property
    def is_even(self) -> bool:
        """Whether what was measured does not tell the two apart."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        spread = f" ({self.low:.2f}-{self.high:.2f})" if self.low < self.high else ""
        return f"{self.value:.2f}x{spread}{', even' if spread and self.is_even else ''}"


@cache
def _outside(rounds: int) -> int:
    """How many of so many sorted values lie below an interval, and as many above it, that holds the median with a
    probability of at least 99.9 %."""
    below, outside = 0.0, -1
    while below <= 0.0005 * 2.0**rounds:
        outside += 1
        below += comb(rounds, outside)
    return max(outside - 1, 0)


class MachineWatch:
    """How busy the machine has been since this was made: `state()`, plain types, for JSON.

    `cores` of this machine; `load`, over the last minute; `others`, how many cores other processes have kept busy;
    `mhz`, of the first core, now. Without what the system does not tell.
    """

    def __init__(self) -> None:
        self._begin = _busy_seconds()

    def state(self) -> dict[str, float]:
        found: dict[str, float] = {"cores": os.cpu_count() or 1}
        if hasattr(os, "getloadavg"):
            found["load"] = round(os.getloadavg()[0], 2)
        now = _busy_seconds()
        if self._begin is not None and now is not None:
            passed, busy = (b - a for a, b in zip(self._begin, now, strict=True))
            found["others"] = round(max(busy / passed, 0.0), 2) if passed > 0 else 0.0
        current = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
        if current.is_file():
            found["mhz"] = round(int(current.read_text()) / 1e3)
        elif lines := [line for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]:
            found["mhz"] = round(float(lines[0].split(":")[1]))
        return found


def _busy_seconds() -> tuple[float, float] | None:
    """The clock, and seconds in which cores were busy with what is not this process; None where nobody tells."""
    for line in _lines("/proc/stat"):
        name, *ticks = line.split()
        if name == "cpu":  # user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two
            all_of_them = sum(map(int, ticks[:3])) + sum(map(int, ticks[5:8]))
            own = os.times()
            return time.monotonic(), all_of_them / os.sysconf("SC_CLK_TCK") - own.user - own.system
    return None


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []


class PeakMemory(TorchDispatchMode):
    """Inside of it, `peak` is the largest number of bytes that new tensors held at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._hold(x.untyped_storage(), given)
        return result

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._alive:  # a view, or written in place
            return
        self._alive.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def free_bytes() -> int | None:
    """Memory that this process may still take; None where the system does not say."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    known = []
    if meminfo.is_file():
        sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
        known.append(1024 * int(sizes["MemAvailable"].split()[0]))
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        known.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if (group / "memory.max").is_file() and (group / "memory.max").read_text().strip() != "max":
        known.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(known, default=None)
