"""Seconds, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.benchmark import Timer


def median_ms(
    functions: Sequence[Callable[[], Any]], device: str = "cpu", seconds: float = 0.1, rounds: int = 5
) -> list[float]:
    """Median milliseconds of each function, timed in turns so that a busy machine slows all alike.

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
            kept.append(timer.blocked_autorange(min_run_time=seconds / rounds).median)
    return [1e3 * statistics.median(kept) for kept in times]
