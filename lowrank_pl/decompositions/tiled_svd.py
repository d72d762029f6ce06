"""Tiled SVD: the lowered matrix cut into square tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from lowrank_pl.checks import check_among, check_int
from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import Run, lowered, tile_regions, tile_side
from lowrank_pl.linalg import decompose
from lowrank_pl.metric import Metric, lowered_roots
from lowrank_pl.structures import Layout, Rank, Tiles


@final
@dataclass(frozen=True)
class TiledSVD(Decomposition):
    """Square tiles of side `k = min(tile, T, S)` of the matrix `T x (S d d)`, each at rank r: Lee et al. (2019), 4.2.

    Tiles at an edge that k does not divide are smaller, with rank `min(r, their sides)`. Grouped convolutions are tiled
    group by group; of transposed ones the matrix is the adjoint's, `(T d d) x S`. `run` says how the extracted layer
    computes, `"factors"` or `"dense"`; None: extraction measures both and takes the faster. The rank is one number. For
    linear layers and convolutions; not for depthwise ones, whose tiles would be single weights.
    """

    tile: int = 64
    run: Run | None = None

    def __post_init__(self) -> None:
        check_int("tile", self.tile, 1)
        check_among("run", self.run, ("factors", "dense", None))

    def by_stages(self) -> TiledSVD:
        return self if self.run else replace(self, run="factors")

    def unsupported(self, layer: LayerSpec) -> str | None:
        single = layer.groups > 1 and layer.groups in (layer.in_channels, layer.out_channels)
        return "needs groups of more than one channel" if single else None

    def side(self, layer: LayerSpec) -> int:
        """The tiles' side k."""
        return tile_side(layer, self.tile)

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (self.side(layer),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Tiles:
        return Tiles(layer, self.side(layer), rank[0], self.run)

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        matrices, systems = lowered(weight, layer), []
        outputs, inputs = (None, None) if metric is None else lowered_roots(metric)
        for rows, columns in tile_regions(layer, self.side(layer)):
            tiles = (
                matrices[:, rows.start : rows.stop, columns.start : columns.stop]
                .reshape(-1, rows.tiles, rows.size, columns.tiles, columns.size)
                .transpose(2, 3)
            )  # [g, m, n, h, w]
            left = None if outputs is None else outputs.blocks(rows.start, rows.tiles, rows.size).unsqueeze(2)
            right = None if inputs is None else inputs.blocks(columns.start, columns.tiles, columns.size).unsqueeze(1)
            systems.append(decompose(tiles, left, right))
        found = Truncation(self, layer, systems, _arrange)
        return found if metric is None else Stagewise(self, layer, weight, metric, found)


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    lefts = [left.transpose(2, 3).flatten(3).flatten(0, 1) for left, _ in factors]  # [g m, h, n r]
    rights = [right.transpose(1, 2).flatten(2, 3).flatten(0, 1) for _, right in factors]  # [g n, m r, w]
    return [*lefts, *rights]
