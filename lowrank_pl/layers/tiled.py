"""The deployed form of tiled SVD: a grid of low-rank tiles, or the dense weight that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.dense_run import DenseRun, run_dense
from lowrank_pl.layers.lazy_weight import Made, weight_of_factors
from lowrank_pl.layers.lowering import margins_of

Run = Literal["factors", "dense"]
Grid = tuple["Slab", "Slab", Tensor, Tensor]  # a region's rows and columns, and its left and right factors


class Slab(NamedTuple):
    """`tiles` neighbouring tiles of `size` rows (or columns) each, from row (or column) `start` on."""

    start: int
    tiles: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.tiles * self.size


def slabs(length: int, tile: int) -> list[Slab]:
    """Whole tiles first, then, where the tile does not divide the length, one smaller tile."""
    whole, rest = divmod(length, tile)
    return [slab for slab in (Slab(0, whole, tile), Slab(whole * tile, 1, rest)) if slab.tiles * slab.size]


def lowered(weight: Tensor, spec: LayerSpec) -> Tensor:
    """The matrices `[groups, rows, columns]` that patches of the input are multiplied by, `T x (S d d)` in each group;
    for transposed convolutions those that give patches of the output, `(T d d) x S`."""
    matrices: Tensor = weight.unflatten(0, (spec.groups, -1)).flatten(2)
    return matrices.mT if spec.kind == "conv_transpose" else matrices


def tile_side(spec: LayerSpec, tile: int) -> int:
    """The tiles' side: `tile`, or fewer where a group has fewer inputs or outputs."""
    return min(tile, spec.out_channels // spec.groups, spec.in_channels // spec.groups)


def tile_regions(spec: LayerSpec, tile: int) -> list[tuple[Slab, Slab]]:
    """Each group's lowered matrix as at most four rectangles, each a grid of equal tiles, row by row."""
    first, *others = spec.stored_shape
    rows, columns = first // spec.groups, math.prod(others)
    if spec.kind == "conv_transpose":
        rows, columns = columns, rows
    return [(row, column) for row in slabs(rows, tile) for column in slabs(columns, tile)]


def factor_shapes(spec: LayerSpec, region: tuple[Slab, Slab], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the left factor, `[g m, h, n r]`, and of the right one, `[g n, m r, w]`, of a region of `m x n` tiles."""
    m, n = region
    r = min(rank, m.size, n.size)
    return (spec.groups * m.tiles, m.size, n.tiles * r), (spec.groups * n.tiles, m.tiles * r, n.size)


def weight_of_tiles(spec: LayerSpec, grids: Sequence[Grid]) -> Tensor:
    """The weight, as PyTorch stores it, that regions of tiles, row by row, make."""
    rows: dict[int, list[Tensor]] = {}
    for m, n, left, right in grids:
        lefts = left.unflatten(0, (spec.groups, -1)).unflatten(3, (n.tiles, -1))
        rights = right.unflatten(0, (spec.groups, -1)).unflatten(2, (m.tiles, -1))
        tiles = torch.einsum("gihjr,gjirw->gihjw", lefts, rights)
        rows.setdefault(m.start, []).append(tiles.reshape(-1, m.tiles * m.size, n.tiles * n.size))
    matrices = torch.cat([torch.cat(row, dim=2) for row in rows.values()], dim=1)
    stored = matrices.mT if spec.kind == "conv_transpose" else matrices
    return stored.reshape(spec.stored_shape)


def portable(
    x: Tensor,
    left: list[Tensor],
    right: list[Tensor],
    bias: Tensor | None,
    geometry: list[list[int]],
    groups: int,
    transposed: bool,
    mode: str,
) -> Tensor:
    """A `TiledLayer` that runs dense, in words that TorchScript knows: regions are as large as their factors say."""
    shape, columns, margins, stride, padding, dilation, extra = geometry
    rows: list[Tensor] = []
    row: list[Tensor] = []
    width = 0
    for a, b in zip(left, right):  # noqa: B905 (TorchScript knows no `strict`)
        m, n = a.shape[0] // groups, b.shape[0] // groups
        lefts = a.unflatten(0, (groups, -1)).unflatten(3, (n, -1))
        rights = b.unflatten(0, (groups, -1)).unflatten(2, (m, -1))
        tiles = torch.einsum("gihjr,gjirw->gihjw", lefts, rights)
        row.append(tiles.reshape(groups, m * a.shape[1], n * b.shape[2]))
        width += n * b.shape[2]
        if width == columns[0]:
            rows.append(torch.cat(row, dim=2))
            row.clear()
            width = 0
    matrices = torch.cat(rows, dim=1)
    weight = (matrices.transpose(1, 2) if transposed else matrices).reshape(shape)
    if len(shape) == 2:
        return F.linear(x, weight, bias)
    if max(margins) > 0:
        x = F.pad(x, margins, mode)
    return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, extra, groups)


torch.fx.wrap("portable")  # which loops and branches, as torch.fx cannot follow


class TiledLayer(DenseRun):
    """A linear layer or convolution whose lowered weight is, in each of g groups, tiles of rank at most `rank`.

    Parameters per region of `tile_regions` with `m x n` tiles of `h x w`, rank `r = min(rank, h, w)`:
    `left.i` `[g m, h, n r]` and `right.i` `[g n, m r, w]`. With `run="factors"` the layer multiplies by them (two
    batched products, after im2col, or before col2im in transposed convolutions); with `run="dense"` it rebuilds the
    weight once, when first used, and runs as the dense layer does: a small file at dense speed. Rebuilt whenever a
    factor has changed. In `torch.jit.script` and `torch.fx` it runs dense, and rebuilds at every call.
    """

    __jit_unused_properties__ = ("weight",)  # for torch.jit.script

    def __init__(self, spec: LayerSpec, tile: int, rank: int, bias: bool, run: Run) -> None:
        super().__init__()
        self.spec, self.tile, self.rank = spec.with_(inputs=()), tile, rank
        self.run: Run = run
        self.regions = tile_regions(spec, tile)
        shapes = [factor_shapes(spec, region, rank) for region in self.regions]
        self.left = nn.ParameterList(torch.empty(left) for left, _ in shapes)
        self.right = nn.ParameterList(torch.empty(right) for _, right in shapes)
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None
        for factor in (*self.left, *self.right):
            nn.init.normal_(factor, std=(rank * spec.num_weights / spec.out_channels) ** -0.25)
        # lists of integers, as TorchScript keeps them, and none of them empty, since it could not tell the type
        self._padding = margins_of(spec) or [0]
        self._geometry = _geometry(spec, self._padding)
        self._groups, self._transposed = spec.groups, spec.kind == "conv_transpose"
        self._mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        layer = self._multiply_vectors if self.spec.kind == "linear" and self.run == "factors" else None
        return weight_of_factors(self.left[0], self.spec.stored_shape, Made(self._weight, layer))

    def dense_weight(self) -> Tensor:
        """The weight that the tiles make, as PyTorch stores it."""
        return weight_of_tiles(self.spec, self._grids())

    def _grids(self) -> list[Grid]:
        """Region by region its rows, its columns and its factors; by number, as every TorchDynamo can follow."""
        return [(m, n, self.left[i], self.right[i]) for i, (m, n) in enumerate(self.regions)]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._portable(x)
        else:  # which TorchScript leaves out
            return self._forward(x)

    def _portable(self, x: Tensor) -> Tensor:
        left = [factor for factor in self.left]
        right = [factor for factor in self.right]
        return portable(x, left, right, self.bias, self._geometry, self._groups, self._transposed, self._mode)

    def _forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return self._portable(x)
        return run_dense(x, self._weight(), self.bias, self.spec) if self.run == "dense" else self._forward_factors(x)

    def factors(self) -> list[Tensor]:
        return [factor for _, _, left, right in self._grids() for factor in (left, right)]

    def _forward_factors(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.spec.kind == "linear":
            y = self._multiply_vectors(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        axes = len(self.spec.kernel)
        if x.dim() == axes + 1:
            return self._forward_factors(x.unsqueeze(0)).squeeze(0)
        size = self.spec.with_(inputs=((1, *x.shape[2:]),)).outputs[0][1:]
        if self.spec.kind == "conv_transpose":
            y = self._fold(self._multiply(x.flatten(2)), x.shape[2:], size)
        else:
            y = self._multiply(self._unfold(self._pad(x))).unflatten(2, size)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * axes)

    def _multiply_vectors(self, x: Tensor) -> Tensor:
        """`[..., S]` to `[..., T]`."""
        return self._multiply(x.reshape(1, -1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], self.spec.out_channels)

    def _multiply(self, columns: Tensor) -> Tensor:
        """`[B, S d d, P]` to `[B, T, P]`; of transposed convolutions `[B, S, P]` to `[B, T d d, P]`."""
        groups = self.spec.groups
        rows: dict[int, Tensor] = {}
        columns = columns.unflatten(1, (groups, -1))
        for m, n, left, right in self._grids():
            x = columns[:, :, n.start : n.stop].unflatten(2, (n.tiles, n.size)).flatten(1, 2)
            inner = (right @ x).unflatten(1, (groups, -1)).unflatten(3, (m.tiles, -1))  # [B, g, n, m, r, P]
            inner = inner.transpose(2, 3).flatten(3, 4).flatten(1, 2)
            y = (left @ inner).unflatten(1, (groups, -1)).flatten(2, 3)
            rows[m.start] = rows[m.start] + y if m.start in rows else y
        return torch.cat(list(rows.values()), dim=2).flatten(1, 2)

    def _unfold(self, x: Tensor) -> Tensor:
        """The patches, `[B, S, *size]` to `[B, S d d, P]`: `F.unfold`, which is for two axes only."""
        spec, axes = self.spec, len(self.spec.kernel)
        for axis, (kernel, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True)):
            x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        windows = x.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
        return windows.flatten(2 + axes).flatten(1, 1 + axes)

    def _fold(self, columns: Tensor, places: Sequence[int], size: tuple[int, ...]) -> Tensor:
        """The patches `[B, T d d, P]` added up, each where its input stands: `[B, T, *size]`."""
        spec = self.spec
        patches = columns.unflatten(2, tuple(places)).unflatten(1, (spec.out_channels, math.prod(spec.kernel)))
        margins = [int(p) for p in spec.padding]
        y = columns.new_zeros(*patches.shape[:2], *(n + 2 * p for n, p in zip(size, margins, strict=True)))
        axes = list(zip(spec.dilation, spec.stride, places, strict=True))
        for i, position in enumerate(product(*map(range, spec.kernel))):
            steps = (slice(d * k, d * k + s * (n - 1) + 1, s) for k, (d, s, n) in zip(position, axes, strict=True))
            reached: tuple[Any, ...] = (..., *steps)
            y[reached] += patches[:, :, i]
        inside: tuple[Any, ...] = (..., *(slice(p, p + n) for p, n in zip(margins, size, strict=True)))
        return y[inside]

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self._padding, mode=self._mode)

    def extra_repr(self) -> str:
        return (
            f"{self.spec.out_channels} x {self.spec.in_channels}, tile={self.tile}, rank={self.rank}, run={self.run!r}"
        )


def _geometry(spec: LayerSpec, margins: list[int]) -> list[list[int]]:
    """Shape, columns of a group's matrix, padding before and in the convolution, and so on, for `portable`."""
    transposed, nothing = spec.kind == "conv_transpose", [0] * len(spec.kernel)
    columns = spec.in_channels // spec.groups * (1 if transposed else math.prod(spec.kernel))
    inside = [int(p) for p in spec.padding] if transposed else nothing
    extra = list(spec.output_padding) if transposed else nothing
    before = [0] if transposed else margins
    sizes = [list(spec.stored_shape), [columns], before, list(spec.stride), inside, list(spec.dilation), extra]
    return [each or [0] for each in sizes]
