"""What fewer multiply-adds are worth: every layer as every structure over ranks, counted and timed."""

from __future__ import annotations

import csv
import io
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.checks import check_int, check_number
from lowrank_pl.decompositions import Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import build
from lowrank_pl.names import kinds_of
from lowrank_pl.structures import Layout, Rank
from lowrank_pl.targets import check_patterns, matches
from lowrank_pl.timing import run_all, times_ms
from lowrank_pl.tracing import record

MOST = 16.0  # times fewer multiply-adds, at the smallest rank that is looked at


@dataclass(frozen=True)
class Shape:
    """Layers of one shape on inputs of one size: their names, and how many they are."""

    names: tuple[str, ...]
    layer: LayerSpec
    bias: bool

    @property
    def macs(self) -> int:
        """Multiply-adds of one of them, for one input of the network."""
        assert self.layer.macs is not None
        return self.layer.macs


@dataclass(frozen=True)
class Speedup:
    """A layer as one structure at one rank: how much faster it should be, and is."""

    shape: Shape
    structure: str
    rank: Rank
    params: int
    macs: int
    dense_seconds: float
    seconds: float
    measured: float
    quartiles: tuple[float, float]

    @property
    def theoretical(self) -> float:
        """How many times fewer multiply-adds it takes."""
        return self.shape.macs / self.macs


@dataclass(frozen=True)
class Conditions:
    """How layers are timed: on so many inputs of the network at once, about `seconds` for each rank, in `rounds`."""

    batch: int = 1
    device: str = "cpu"
    channels_last: bool = False
    seconds: float = 0.2
    rounds: int = 9

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            check_int(name, getattr(self, name), 1)
        check_number("seconds", self.seconds, lambda x: 0 < x < float("inf"), "above 0")


def decompositions_named(names: Sequence[str] | None = None) -> dict[str, Decomposition]:
    """All decompositions with their default settings, or those of these names. Raises `ValueError` for another name."""
    known = kinds_of(Decomposition)  # type: ignore[type-abstract]
    for name in names or ():
        if name not in known:
            raise ValueError(f"Expected `structures` to be some of {', '.join(sorted(known))} but got {name!r}")
    return {name: known[name]() for name in names or known}


def shapes_of(net: nn.Module, example: Tensor, patterns: Sequence[str] = ("*",)) -> list[Shape]:
    """The layers that run on the example, those of equal shape together, the most costly ones first.

    Raises `ValueError` for a pattern that matches no layer, and where no layer is left.
    """
    maps = find_maps(net)
    check_patterns(patterns, maps, "layers")
    trace = record(net.eval(), example)
    found: dict[tuple[LayerSpec, bool], list[str]] = {}
    for name, each in maps.items():
        layer = trace.on(name, each.layer).with_(share=1.0)
        if matches(name, patterns) and layer.macs:
            found.setdefault((layer, each.bias is not None), []).append(name)
    if not found:
        raise ValueError(f"None of the layers that match {', '.join(map(repr, patterns))} run on this input")
    shapes = [Shape(tuple(names), layer, bias) for (layer, bias), names in found.items()]
    return sorted(shapes, key=lambda shape: -shape.macs * len(shape.names))


def some_ranks(decomposition: Decomposition, layer: LayerSpec, points: int) -> list[Rank]:
    """Up to so many ranks, in every entry the same share of the full one, at which the multiply-adds are those of the
    layer, or fewer by about the same factor from one to the next, down to a sixteenth."""
    full = decomposition.full_rank(layer)
    count = min(max(full), 4096)  # of low rank + sparse it would be every weight
    ranks = [decomposition.at_fraction(layer, (i + 1) / count) for i in range(count)]
    dense = layer.macs or 0
    chosen = []
    for times in np.geomspace(1, MOST, points):
        place = bisect_right(ranks, dense / times, key=lambda rank: decomposition.layout(layer, rank).of_factors().macs)
        if place:
            chosen.append(ranks[place - 1])
    return sorted(dict.fromkeys(chosen), reverse=True)


def pairs_of(
    shapes: Iterable[Shape], decompositions: Mapping[str, Decomposition], points: int
) -> list[tuple[Shape, str, list[Layout], list[Rank]]]:
    """What is to be timed, one layer as one structure after another: at these ranks it is deployed so."""
    pairs = []
    for shape in shapes:
        for name, decomposition in decompositions.items():
            ranks = [] if decomposition.unsupported(shape.layer) else some_ranks(decomposition, shape.layer, points)
            if ranks:
                pairs.append((shape, name, [decomposition.layout(shape.layer, r).of_factors() for r in ranks], ranks))
    return pairs


@torch.no_grad()
def measure(
    shape: Shape, structure: str, layouts: Sequence[Layout], ranks: Sequence[Rank], conditions: Conditions
) -> Iterator[Speedup]:
    """The dense layer and its structures at all ranks, in turns; how much faster they are is compared round by round.

    Numbers are random: no time depends on them.
    """
    where: dict[str, Any] = {"device": conditions.device}
    if conditions.channels_last and len(shape.layer.kernel) == 2:
        where["memory_format"] = torch.channels_last
    inputs = [
        torch.randn(conditions.batch * vectors, shape.layer.in_channels, *size).to(**where)
        for vectors, *size in shape.layer.inputs
    ]
    modules = [build(shape.layer, shape.bias), *(layout.build(shape.bias) for layout in layouts)]
    calls = [partial(run_all, module.eval().to(**where), inputs) for module in modules]
    kind = torch.device(conditions.device).type
    dense, *others = times_ms(calls, kind, conditions.seconds, conditions.rounds)
    for rank, layout, times in zip(ranks, layouts, others, strict=True):
        ratios = [before / after for before, after in zip(dense, times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        assert layout.macs is not None
        seconds = (statistics.median(dense) / 1e3, statistics.median(times) / 1e3)
        yield Speedup(shape, structure, rank, layout.num_weights, layout.macs, *seconds, middle, (low, high))


def to_csv(speedups: Iterable[Speedup]) -> str:
    """One line for each. `layer` is the first of `layers` that have this shape; `size` that of its inputs; seconds are
    those of a batch, `macs` those of one input."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(_COLUMNS)
    for each in speedups:
        layer = each.shape.layer
        table.writerow([
            each.shape.names[0], kernel_of(layer), layer.in_channels, layer.out_channels, size_of(layer),
            each.structure, "x".join(map(str, each.rank)), each.params, each.macs, f"{each.theoretical:.4g}",
            f"{each.dense_seconds:.4g}", f"{each.seconds:.4g}", f"{each.measured:.4g}",
            *(f"{quartile:.4g}" for quartile in each.quartiles), len(each.shape.names),
        ])  # fmt: skip
    return file.getvalue()


_COLUMNS = ("layer", "kernel", "in", "out", "size", "structure", "rank", "params", "macs", "macs_speedup",
            "seconds_dense", "seconds", "speedup", "speedup_q25", "speedup_q75", "layers")  # fmt: skip


def kernel_of(layer: LayerSpec) -> str:
    """In words, such as `3x3 /2` with stride 2, or `linear`."""
    kind = {"linear": "linear", "conv": "", "conv_transpose": "transposed"}[layer.kind]
    strides = "x".join(map(str, layer.stride if len(set(layer.stride)) > 1 else layer.stride[:1]))
    words = [kind, "x".join(map(str, layer.kernel)), f"/{strides}" if strides not in ("", "1") else ""]
    return " ".join(filter(None, [*words, f"groups {layer.groups}" if layer.groups > 1 else ""]))


def size_of(layer: LayerSpec) -> str:
    """Of its inputs, call after call, such as `32x32`; of a linear layer, the number of vectors."""
    return "+".join("x".join(map(str, size or [vectors])) for vectors, *size in layer.inputs)
