"""Tensor trains of linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TypeAlias, final

import torch
from torch import Tensor

from lowrank_pl.checks import check_among
from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import MOST_CORES, Run, bonds
from lowrank_pl.linalg import Root, check_finite, tt_svd, tt_tails
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Cores, Rank, Structure

Shape: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

SMALLEST = 4  # factor of a size that is worth a core; Novikov et al. have 4 to 8


@final
@dataclass(frozen=True)
class TensorTrain(Decomposition):
    """`W(i_1..i_d; j_1..j_d) = G_1[i_1, j_1] ... G_d[i_d, j_d]`: the TT-layer of Novikov et al. (NIPS 2015).

    `shape` is a pair, how the outputs and how the inputs factor, one factor for each core: `((4, 4, 4, 4, 4, 4),
    (2, 7, 8, 8, 7, 4))` for their 4096 x 25088; it is for layers of that size alone. None: for each layer as many cores
    as both of its sizes have factors of at least 4, but two at least, factors as equal as can be, those of the outputs
    growing and those of the inputs falling; nothing is padded. The rank is one number, that of every bond between two
    cores, or the bond's largest one where that is smaller. `run` says how the extracted layer computes, `"factors"` or
    `"dense"`; None: extraction measures both and takes the faster. For linear layers, unless both sizes are prime.
    """

    shape: tuple[tuple[int, ...], ...] | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        check_among("run", self.run, ("factors", "dense", None))
        if self.shape is not None:
            object.__setattr__(self, "shape", _checked(self.shape))

    @property
    def names_its_layers(self) -> bool:
        return self.shape is not None

    def by_stages(self) -> TensorTrain:
        return self if self.run else replace(self, run="factors")

    def unsupported(self, layer: LayerSpec) -> str | None:
        if layer.kind != "linear" or layer.groups > 1:
            return "needs a linear layer"
        if self.shape is None and _factored(layer.out_channels, layer.in_channels) is None:
            return f"needs a size with factors, which {layer.out_channels} x {layer.in_channels} has not"
        sizes = tuple(map(math.prod, self._factors(layer)))
        if sizes != (layer.out_channels, layer.in_channels):
            given = f"{layer.out_channels} and {layer.in_channels}"
            return f"needs {sizes[0]} outputs and {sizes[1]} inputs, its `shape`, not {given}"
        return None

    def full_rank(self, layer: LayerSpec) -> Rank:
        rows, columns = self._factors(layer)
        return (max(bonds([m * n for m, n in zip(rows, columns, strict=True)])),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Cores:
        return Cores(layer, *self._factors(layer), rank[0], self.run)

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        check_finite(weight)
        rows, columns = self._factors(layer)
        roots: list[Root | None] = [None] * (2 * len(rows))
        if metric is not None:
            pairs = (_along(root, sizes) for root, sizes in ((metric.outputs, rows), (metric.inputs, columns)))
            roots = [root for pair in zip(*pairs, strict=True) for root in pair]
        axes = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
        tensor = weight.reshape(*rows, *columns).permute(axes)
        for axis, root in enumerate(roots):
            if root is not None:
                tensor = root.to(tensor.device).times(tensor.double().movedim(axis, -1)).movedim(-1, axis)
        sizes = [m * n for m, n in zip(rows, columns, strict=True)]
        found = TTSVD(self, layer, tensor.to(weight.dtype).reshape(sizes), tuple(roots))
        return found if metric is None else Stagewise(self, layer, weight, metric, found)

    def _factors(self, layer: LayerSpec) -> Shape:
        """Of the outputs and of the inputs."""
        found = self.shape or _factored(layer.out_channels, layer.in_channels)
        assert found is not None
        rows, columns = found
        return rows, columns


@final
@dataclass(frozen=True, eq=False)
class TTSVD(Analysis):
    """A weight as a tensor `[rows[1] columns[1], ..., rows[d] columns[d]]`, which has been multiplied by `roots` along
    its rows[1], columns[1], rows[2] ..., where there are any; the cores undo that."""

    decomposition: TensorTrain
    layer: LayerSpec
    tensor: Tensor
    roots: tuple[Root | None, ...]

    @cached_property
    def errors(self) -> tuple[Tensor, ...]:
        """Bounds, where there are more than two cores: what all bonds lose, or the whole norm where that is less."""
        tails = tt_tails(self.tensor)
        total = sum(torch.nn.functional.pad(tail, (0, max(map(len, tails)) - len(tail))) for tail in tails)
        assert isinstance(total, Tensor)
        return (total.clamp(max=float(tails[0][0])),)

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        layout = self.decomposition.layout(self.layer, rank)
        shapes = layout.shapes()
        cores = []
        for k, core in enumerate(tt_svd(self.tensor, [s for _, _, _, s in shapes[:-1]])):
            shaped = core.reshape(shapes[k])
            for axis, root in ((1, self.roots[2 * k]), (2, self.roots[2 * k + 1])):
                if root is not None:
                    shaped = root.to(core.device).solve(shaped.movedim(axis, -1)).movedim(-1, axis)
            cores.append(shaped.to(self.tensor.dtype))
        return Structure(layout, rank, tuple(cores))


def _along(root: Root | None, sizes: Sequence[int]) -> list[Root | None]:
    """Of inputs that are arrays of these sizes, for each axis the root summed up over the others."""
    if root is None:
        return [None] * len(sizes)
    return [root.marginal(sizes, [k]).square.squeeze(0) for k in range(len(sizes))]


@cache
def _factored(outputs: int, inputs: int) -> Shape | None:
    """None where neither of them is a product."""
    most = max(outputs, inputs).bit_length() // 2
    for count in range(most, 1, -1):
        rows, columns = (_balanced(size, count, SMALLEST) for size in (outputs, inputs))
        if rows and columns:
            return rows, columns[::-1]
    pairs = [_balanced(size, 2, 2) for size in (outputs, inputs)]
    if not any(pairs):
        return None
    rows, columns = (pair or (1, size) for pair, size in zip(pairs, (outputs, inputs), strict=True))
    return rows, columns[::-1]


@cache
def _balanced(size: int, count: int, least: int) -> tuple[int, ...] | None:
    """So many factors of at least `least`, growing, with the least sum; None where there are none."""
    if count == 1:
        return (size,) if size >= least else None
    found = []
    factor = least
    while factor**count <= size:
        others = _balanced(size // factor, count - 1, factor) if size % factor == 0 else None
        found += [(factor, *others)] if others else []
        factor += 1
    return min(found, key=sum, default=None)


def _checked(shape: Iterable[Iterable[int]]) -> Shape:
    """As tuples, which can be hashed. Raises `ValueError` for what is no pair of factors."""
    try:
        rows, columns = (tuple(factors) for factors in shape)
    except (TypeError, ValueError):
        rows, columns = (), ()
    if not (1 < len(rows) == len(columns) <= MOST_CORES and all(type(n) is int and n >= 1 for n in (*rows, *columns))):
        raise ValueError(
            "Expected argument `shape` to be a pair of as many factors of the outputs as of the inputs, 2 to 16, "
            f"such as ((4, 8), (7, 4)) for 32 outputs and 28 inputs, but got {shape!r}"
        )
    return rows, columns
