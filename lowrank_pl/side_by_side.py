"""Two modules timed side by side, within limits of time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from rich.progress import track
from torch import nn

from lowrank_pl.surgery import is_same_computation
from lowrank_pl.terminal import terminal
from lowrank_pl.timing import MachineWatch, PeakMemory, Ratio, free_bytes, times_ms
from lowrank_pl.tracing import Call

T = TypeVar("T")
Pair: TypeAlias = tuple[list[float], list[float]]  # milliseconds of two modules, round by round
Times: TypeAlias = dict[str, Pair]  # by batch size

BATCHES = (1, 32)
SECONDS = 60.0  # for all timing of a report; what would take longer is left out
SHORT = 0.005  # seconds of a round, of each module, or one call
WARM_UP = 2  # calls of `times_ms` before its first round


@dataclass(frozen=True)
class Effort:
    """At most `most` rounds, and beyond `least` no more than take so many seconds."""

    least: int
    most: int
    seconds: float


LAYER, NETWORK = Effort(5, 21, 0.3), Effort(11, 81, 6.0)


def medians(times: Times) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of both, by batch size."""
    first, second = ({size: statistics.median(pair[i]) for size, pair in times.items()} for i in range(2))
    return first, second


def ratios(times: Times) -> dict[str, Ratio]:
    """How many times faster the second one is, by batch size."""
    return {size: Ratio.of(*pair) for size, pair in times.items()}


def added(pairs: Sequence[Pair]) -> Pair:
    """What several modules take one after another; of as many rounds as all of them have."""
    first, second = ([sum(together) for together in zip(*(pair[i] for pair in pairs))] for i in range(2))  # noqa: B905
    return first, second


class SideBySide:
    """Times two modules side by side, as long as there is time."""

    def __init__(self, wanted: bool) -> None:
        self._sizes = BATCHES if wanted else ()
        self._end = time.monotonic() + SECONDS
        self._machine = MachineWatch()

    def state(self) -> dict[str, float]:
        """How busy the machine was meanwhile; nothing where nothing was timed."""
        return self._machine.state() if self._sizes else {}

    def shown(self, layers: list[T]) -> Iterable[T]:
        """The layers, with a progress bar in a terminal while they are timed."""
        console = terminal()
        hidden = not (self._sizes and console.is_terminal)
        return track(layers, "Timing layers", console=console, transient=True, disable=hidden)

    def times(
        self, pair: Sequence[nn.Module], batch_of: Callable[[int], Call], device: torch.device, effort: Effort = LAYER
    ) -> Times:
        """Of both, without the sizes that do not run or fit into memory and time."""
        found: Times = {}
        for size in self._sizes:
            try:
                both = self._both(pair, batch_of, size, device, effort)
            except Exception:  # of any kind: too little memory, or a network that wants batches of another size
                break
            if both is None:
                break
            found[str(size)] = both
        return found

    def _both(
        self,
        pair: Sequence[nn.Module],
        batch_of: Callable[[int], Call],
        size: int,
        device: torch.device,
        effort: Effort,
    ) -> Pair | None:
        """In turns. What was not replaced takes the same time by construction: no noise of the measurement is shown as
        a gain. None where it would take more than half of the time that is left, or memory that is not there."""
        modules = pair[:1] if is_same_computation(*pair) else pair
        probes = [_probe(_runner(module, batch_of(1)), device) for module in modules]
        free = free_bytes() if device.type == "cpu" else None
        if free is not None and size * max(taken for _, taken in probes) > free:
            return None
        per_round = size * sum(seconds for seconds, _ in probes)
        rounds = min(max(int(effort.seconds / per_round), effort.least), effort.most)
        rounds = min(rounds, int((self._end - time.monotonic()) / 2 / per_round) - WARM_UP)
        if rounds <= 0:
            return None
        times = times_ms([_runner(m, batch_of(size)) for m in modules], device.type, SHORT * rounds, rounds)
        return times[0], times[-1]


def _probe(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds and bytes that one call takes."""
    begin = time.perf_counter()
    with PeakMemory() as memory:
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, memory.peak


def _runner(module: nn.Module, call: Call) -> Callable[[], Any]:
    @torch.inference_mode()
    def run_once() -> None:
        module(*call.args, **call.kwargs)

    return run_once
