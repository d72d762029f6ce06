"""The deployed form of tiled SVD: a grid of low-rank tiles, or the dense weight that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.lazy_weight import weight_of_factors

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


def tile_regions(spec: LayerSpec, tile: int) -> list[tuple[Slab, Slab]]:
    """The lowered matrix `T x (S d d)` as at most four rectangles, each a grid of equal tiles, row by row."""
    rows, columns = spec.out_channels, spec.num_weights // spec.out_channels
    return [(row, column) for row in slabs(rows, tile) for column in slabs(columns, tile)]


def factor_shapes(region: tuple[Slab, Slab], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the left factor, `[m, h, n r]`, and of the right one, `[n, m r, w]`, of a region of `m x n` tiles."""
    m, n = region
    r = min(rank, m.size, n.size)
    return (m.tiles, m.size, n.tiles * r), (n.tiles, m.tiles * r, n.size)


def weight_of_tiles(spec: LayerSpec, grids: Sequence[Grid]) -> Tensor:
    """The weight `[T, S, *kernel]` that regions of tiles, row by row, make."""
    rows: dict[int, list[Tensor]] = {}
    for m, n, left, right in grids:
        tiles = torch.einsum("ihjr,jirw->ihjw", left.unflatten(2, (n.tiles, -1)), right.unflatten(1, (m.tiles, -1)))
        rows.setdefault(m.start, []).append(tiles.reshape(m.tiles * m.size, n.tiles * n.size))
    return torch.cat([torch.cat(row, dim=1) for row in rows.values()]).reshape(spec.operator_shape)


def portable(
    x: Tensor,
    left: list[Tensor],
    right: list[Tensor],
    bias: Tensor | None,
    shape: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    mode: str,
) -> Tensor:
    """A `TiledLayer` that runs dense, in words that TorchScript knows: regions are as large as their factors say."""
    rows: list[Tensor] = []
    row: list[Tensor] = []
    width, columns = 0, 1
    for size in shape[1:]:
        columns *= size
    for a, b in zip(left, right):  # noqa: B905 (TorchScript knows no `strict`)
        m, n = a.shape[0], b.shape[0]
        tiles = torch.einsum("ihjr,jirw->ihjw", a.unflatten(2, (n, -1)), b.unflatten(1, (m, -1)))
        row.append(tiles.reshape(m * a.shape[1], n * b.shape[2]))
        width += n * b.shape[2]
        if width == columns:
            rows.append(torch.cat(row, dim=1))
            row.clear()
            width = 0
    weight = torch.cat(rows).reshape(shape)
    if len(shape) == 2:
        return F.linear(x, weight, bias)
    if max(padding) > 0:
        x = F.pad(x, padding, mode)
    return F.conv2d(x, weight, bias, stride, 0, dilation)


torch.fx.wrap("portable")  # which loops and branches, as torch.fx cannot follow


class TiledLayer(nn.Module):
    """A linear layer or 2-d convolution whose lowered weight is a grid of tiles of rank at most `rank`.

    Parameters per region of `tile_regions` with `m x n` tiles of `h x w`, rank `r = min(rank, h, w)`:
    `left.i` `[m, h, n r]` and `right.i` `[n, m r, w]`. With `run="factors"` the layer multiplies by them (im2col and
    two batched products); with `run="dense"` it rebuilds the weight once, when first used, and runs as the dense
    layer does: a small file at dense speed. Rebuilt whenever a factor has changed. In `torch.jit.script` and `torch.fx`
    it runs dense, and rebuilds at every call.
    """

    __jit_unused_properties__ = ("weight",)  # for torch.jit.script

    def __init__(self, spec: LayerSpec, tile: int, rank: int, bias: bool, run: Run) -> None:
        super().__init__()
        self.spec, self.tile, self.rank = spec.with_(inputs=()), tile, rank
        self.run: Run = run
        self.regions = tile_regions(spec, tile)
        shapes = [factor_shapes(region, rank) for region in self.regions]
        self.left = nn.ParameterList(torch.empty(left) for left, _ in shapes)
        self.right = nn.ParameterList(torch.empty(right) for _, right in shapes)
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None
        for factor in (*self.left, *self.right):
            nn.init.normal_(factor, std=(rank * spec.num_weights / spec.out_channels) ** -0.25)
        # lists of integers, as TorchScript keeps them, and none of them empty, since it could not tell the type
        self._stride, self._dilation = list(spec.stride) or [1], list(spec.dilation) or [1]
        self._shape, self._padding = list(spec.operator_shape), _amounts(spec) or [0]
        self._mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        self._dense: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        return weight_of_factors(self.left[0], self.spec.stored_shape, self.dense_weight)

    def dense_weight(self) -> Tensor:
        """The weight that the tiles make, `[T, S, *kernel]`."""
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
        return portable(x, left, right, self.bias, self._shape, self._stride, self._dilation, self._padding, self._mode)

    def _forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return self._portable(x)
        return self._forward_dense(x) if self.run == "dense" else self._forward_factors(x)

    def _forward_dense(self, x: Tensor) -> Tensor:
        if self.spec.kind == "linear":
            return F.linear(x, self._weight(), self.bias)
        padding: Any = self.spec.padding
        if self.spec.padding_mode != "zeros":
            x, padding = self._pad(x), 0
        return F.conv2d(x, self._weight(), self.bias, self.spec.stride, padding, self.spec.dilation)

    def _weight(self) -> Tensor:
        factors = [factor for _, _, left, right in self._grids() for factor in (left, right)]
        wants_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if wants_grad or traced or factors[0].is_inference():  # the last ones are without versions
            return self.dense_weight()
        key = [(factor.data_ptr(), factor._version) for factor in factors]
        if self._dense is None or self._dense[0] != key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(factors[0].device.type, enabled=False),
            ):
                self._dense = key, self.dense_weight()
        return self._dense[1]

    def _forward_factors(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.spec.kind == "linear":
            y = self._multiply(x.reshape(1, -1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], self.spec.out_channels)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if x.dim() == 3:
            return self._forward_factors(x.unsqueeze(0)).squeeze(0)
        size = self.spec.with_(inputs=((1, *x.shape[2:]),)).outputs[0][1:]
        columns = F.unfold(self._pad(x), self.spec.kernel, self.spec.dilation, 0, self.spec.stride)
        y = self._multiply(columns).unflatten(2, size)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _multiply(self, columns: Tensor) -> Tensor:
        """`[B, S d d, P]` to `[B, T, P]`."""
        rows: dict[int, Tensor] = {}
        for m, n, left, right in self._grids():
            x = columns[:, n.start : n.stop].unflatten(1, (n.tiles, n.size))
            inner = (right @ x).unflatten(2, (m.tiles, -1)).transpose(1, 2).flatten(2, 3)
            y = (left @ inner).flatten(1, 2)
            rows[m.start] = rows[m.start] + y if m.start in rows else y
        return torch.cat(list(rows.values()), dim=1)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self._padding, mode=self._mode)

    def _apply(self, fn: Any, recurse: bool = True) -> TiledLayer:
        self._dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}  # copies and pickles carry the factors only

    def extra_repr(self) -> str:
        return (
            f"{self.spec.out_channels} x {self.spec.in_channels}, tile={self.tile}, rank={self.rank}, run={self.run!r}"
        )


def _amounts(spec: LayerSpec) -> list[int]:
    """The padding as `F.pad` takes it, the last axis first."""
    if spec.padding == "same":  # as PyTorch: the odd one goes behind
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]
        amounts = [(total // 2, total - total // 2) for total in totals]
    else:
        amounts = [(int(p), int(p)) for p in spec.padding]
    return [n for pair in reversed(amounts) for n in pair]
