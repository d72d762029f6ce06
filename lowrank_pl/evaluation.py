"""Forms of one network side by side: dense, compressed, exported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lowrank_pl.exporting import TOLERANCE, Runner, disagreement
from lowrank_pl.surgery import is_same_computation
from lowrank_pl.timing import Ratio, times_ms


@torch.no_grad()
def evaluate(
    networks: dict[str, Runner],
    batches: Iterable[tuple[Tensor, Tensor]],
    images: Callable[[int], Tensor],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, dict[str, Any]]:
    """Accuracy over `batches`, and median milliseconds on `images(1)` and `images(32)`, in turns, on the CPU, with how
    many times faster than `dense` each is.

    `networks` holds `dense` and `compressed`; every further one is also given its largest difference from
    `compressed`, of the largest output's size; None where either gives NaN or infinity, for how many images is in
    `not_finite`. Modules get their images in `memory_format`, as they were trained. A compressed network in which no
    layer was replaced has the dense one's times. Raises `ValueError` for outputs of another shape than `compressed`'s.
    """
    right, worst, count = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0.0), 0
    not_finite = dict.fromkeys(networks, 0)
    for x, labels in batches:
        outputs = {name: network(x.contiguous()) for name, network in networks.items()}
        count += len(labels)
        for name, logits in outputs.items():
            if logits.shape != outputs["compressed"].shape:
                shapes = list(outputs["compressed"].shape), list(logits.shape)
                raise ValueError(f"{name}: expected outputs of shape {shapes[0]} but got {shapes[1]}")
            not_finite[name] += len(logits) - int(logits.isfinite().flatten(1).all(1).sum())
            right[name] += int((logits.argmax(1) == labels).sum())
            worst[name] = max(worst[name], disagreement(logits, outputs["compressed"]))
    results: dict[str, dict[str, Any]] = {
        name: {"accuracy": right[name] / count, "not_finite": not_finite[name]} for name in networks
    }
    for name in networks.keys() - {"dense", "compressed"}:
        results[name]["difference"] = worst[name] if math.isfinite(worst[name]) else None
    dense, compressed = networks["dense"], networks["compressed"]
    both = isinstance(dense, nn.Module) and isinstance(compressed, nn.Module)
    timed = dict(networks)
    if both and is_same_computation(dense, compressed):  # type: ignore[arg-type]
        del timed["compressed"]
    for size in (1, 32):
        given = images(size).contiguous()
        own = given.contiguous(memory_format=memory_format)
        calls = [partial(network, own if isinstance(network, nn.Module) else given) for network in timed.values()]
        times = dict(zip(timed, times_ms(calls, seconds=0.3, rounds=61), strict=True))
        for name in networks:
            ms = times.get(name, times["dense"])
            results[name].setdefault("latency_ms", {})[str(size)] = statistics.median(ms)
            results[name].setdefault("speedup", {})[str(size)] = asdict(Ratio.of(times["dense"], ms))
    return results


def problems_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong in what `evaluate` found, and what to do."""
    problems = []
    for name, values in results.items():
        again = "export" if "difference" in values else "train"
        if values["not_finite"]:
            problems.append(f"{name} gives NaN or infinity for {values['not_finite']} images: {again} it again")
        elif "difference" in values and (values["difference"] is None or not values["difference"] <= TOLERANCE):
            problems.append(f"{name} does not agree with the compressed network: export it again")
    return problems


def evaluation_table(results: dict[str, dict[str, Any]]) -> Table:
    """What `evaluate` found, for a terminal."""
    threads = torch.get_num_threads()
    caption = (
        f"Test set. Latency: median, CPU, {threads} thread{'s' if threads > 1 else ''}; how many times faster than "
        "dense, with a 99.9 % interval."
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for column in ("", "accuracy", "difference", "batch 1", "", "batch 32", ""):
        table.add_column(column, justify="right" if len(table.columns) else "left")
    for name, values in results.items():
        difference = "" if values.get("difference") is None else f"{values['difference']:.1g}"
        row = [name, f"{100 * values['accuracy']:.2f} %", difference]
        for size, ms in values["latency_ms"].items():
            row += [f"{ms:.2f} ms", "" if name == "dense" else str(Ratio(**values["speedup"][size]))]
        table.add_row(*row)
    return table
