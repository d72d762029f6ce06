"""Seconds, measured so that they can be compared, and memory."""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer


def times_ms(
    functions: Sequence[Callable[[], Any]], device: str = "cpu", seconds: float = 0.1, rounds: int = 5
) -> list[list[float]]:
    """Milliseconds of each function in each round, timed in turns so that a busy machine slows all alike.

    About `seconds` for each, and at least one call per round. On the current number of threads.
    """
    # The default clock looks for an accelerator at every call, which on a machine without one takes longer than the
    # layer that is timed.
    clock: dict[str, Any] = {"timer": time.perf_counter} if device == "cpu" else {}
    timers = [
        Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads(), **clock)
        for function in functions
    ]
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, kept in zip(timers, times, strict=True):
            kept.append(1e3 * timer.blocked_autorange(min_run_time=seconds / rounds).median)
    return times


def median_ms(
    functions: Sequence[Callable[[], Any]], device: str = "cpu", seconds: float = 0.1, rounds: int = 5
) -> list[float]:
    """The median of `times_ms` over the rounds, of each function."""
    return [statistics.median(kept) for kept in times_ms(functions, device, seconds, rounds)]


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
