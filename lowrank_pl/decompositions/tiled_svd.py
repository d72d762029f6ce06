"""Tiled SVD: the lowered matrix cut into square tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.checks import check_among, check_int
from lowrank_pl.decompositions.base import Decomposition, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import Run, tile_regions
from lowrank_pl.linalg import decompose
from lowrank_pl.structures import Layout, Rank, Tiles


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
        check_int("tile", self.tile, 1)
        check_among("run", self.run, ("factors", "dense", None))

    def unsupported(self, layer: LayerSpec) -> str | None:
        if layer.kind == "linear" or (layer.kind == "conv" and len(layer.kernel) == 2 and layer.groups == 1):
            return None
        return "needs a Linear or an ungrouped Conv2d"

    def side(self, layer: LayerSpec) -> int:
        """The tiles' side k."""
        return min(self.tile, layer.out_channels, layer.in_channels)

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (self.side(layer),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Tiles:
        return Tiles(layer, self.side(layer), rank[0], self.run)

    def analyze(self, weight: Tensor, layer: LayerSpec) -> Truncation:
        matrix = weight.flatten(1)
        regions = [
            matrix[rows.start : rows.stop, columns.start : columns.stop]
            .reshape(rows.tiles, rows.size, columns.tiles, columns.size)
            .transpose(1, 2)
            for rows, columns in tile_regions(layer, self.side(layer))
        ]
        return Truncation(self, layer, [decompose(tiles) for tiles in regions], _arrange)  # of [m, n, h, w]


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    lefts = [left.transpose(1, 2).flatten(2) for left, _ in factors]  # [m, h, n r]
    rights = [right.transpose(0, 1).flatten(1, 2) for _, right in factors]  # [n, m r, w]
    return [*lefts, *rights]
