"""Tiled SVD: the lowered matrix cut into square tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.structure import Rank, Tiles
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import Run, tile_regions
from lowrank_pl.linalg import tail_energies, truncated_svd


@final
@dataclass(frozen=True)
class TiledSVD(Decomposition):
    """Square tiles of side `k = min(tile, T, S)` of the matrix `T x (S d d)`, each at rank r: Lee et al. (2019), 4.2.

    Tiles at an edge that k does not divide are smaller, with rank `min(r, their sides)`. `run` says how the extracted
    layer computes, `"factors"` or `"dense"`; None: extraction measures both and takes the faster. The rank is one
    number. For linear layers and ungrouped two-dimensional convolutions.
    """

    tile: int = 64
    run: Run | None = None

    def __post_init__(self) -> None:
        if type(self.tile) is not int or self.tile < 1:
            raise ValueError(f"Expected argument `tile` to be an int of at least 1 but got {self.tile!r}")
        if self.run not in ("factors", "dense", None):
            raise ValueError(f"Expected argument `run` to be 'factors', 'dense' or None but got {self.run!r}")

    def unsupported(self, layer: LayerSpec) -> str | None:
        if layer.kind == "linear" or (layer.kind == "conv" and len(layer.kernel) == 2 and layer.groups == 1):
            return None
        return "needs a Linear or an ungrouped Conv2d"

    def side(self, layer: LayerSpec) -> int:
        """The tiles' side k."""
        return min(self.tile, layer.out_channels, layer.in_channels)

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (self.side(layer),)

    def stages(self, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        """Per region of equal tiles two grouped products, over the tiles' columns and over their rows."""
        positions = tuple((math.prod(size),) for size in layer.outputs)
        stages = []
        for rows, columns in tile_regions(layer, self.side(layer)):
            inner = rows.tiles * columns.tiles * min(rank[0], rows.size, columns.size)
            right = LayerSpec("linear", columns.tiles * columns.size, inner, groups=columns.tiles, inputs=positions)
            stages += [right, right.then(rows.tiles * rows.size, groups=rows.tiles)]
        return tuple(stages)

    def spectra(self, weight: Tensor, layer: LayerSpec) -> tuple[Tensor, ...]:
        total = torch.zeros(self.side(layer) + 1, dtype=torch.float64, device=weight.device)
        for tiles in self._tiles(weight, layer):
            tails = tail_energies(tiles).sum((0, 1))
            total[: len(tails)] += tails
        return (total,)

    def _factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Tiles:
        lefts, rights = [], []
        for tiles in self._tiles(weight, layer):  # [m, n, h, w]
            left, right = truncated_svd(tiles, min(rank[0], *tiles.shape[-2:]))
            lefts.append(left.transpose(1, 2).flatten(2).to(weight.dtype))  # [m, h, n r]
            rights.append(right.transpose(0, 1).flatten(1, 2).to(weight.dtype))  # [n, m r, w]
        return Tiles(layer, rank, self.side(layer), tuple(lefts), tuple(rights), self.run or "dense")

    def _tiles(self, weight: Tensor, layer: LayerSpec) -> list[Tensor]:
        matrix = weight.flatten(1)
        return [
            matrix[rows.start : rows.stop, columns.start : columns.stop]
            .reshape(rows.tiles, rows.size, columns.tiles, columns.size)
            .transpose(1, 2)
            for rows, columns in tile_regions(layer, self.side(layer))
        ]
