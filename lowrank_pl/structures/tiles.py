"""A grid of low-rank tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import Run, TiledLayer, factor_shapes, lowered, tile_regions, tile_side, weight_of_tiles
from lowrank_pl.linalg import regress
from lowrank_pl.metric import Metric, lowered_roots
from lowrank_pl.structures.base import Layout, total_macs

_NOTES = {"factors": "runs from its factors", "dense": "stored as factors, runs dense"}


@final
@dataclass(frozen=True)
class Tiles(Layout):
    """Square tiles of each group's lowered matrix at rank r: the left and right factors of `TiledLayer`, region by
    region, all left ones first.

    `run` says how the layer computes; None leaves it open, which is dense until something has been measured.
    """

    layer: LayerSpec
    tile: int
    rank: int
    run: Run | None = None

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        """Per region of equal tiles two grouped products, over the tiles' columns and over their rows."""
        layer, stages = self.layer, []
        for region in tile_regions(layer, self.tile):
            m, n = (layer.groups * slab.tiles for slab in region)
            (_, h, _), (_, inner, w) = factor_shapes(layer, region, self.rank)
            right = LayerSpec("linear", n * w, n * inner, groups=n, inputs=layer.positions, share=layer.share)
            stages += [right, right.then(m * h, groups=m)]
        return tuple(stages)

    @property
    def macs(self) -> int | None:
        return total_macs(self.stages) if self.run == "factors" else self.layer.macs

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes = [factor_shapes(self.layer, region, self.rank) for region in tile_regions(self.layer, self.tile)]
        return (*(left for left, _ in shapes), *(right for _, right in shapes))

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        regions = tile_regions(self.layer, self.tile)
        factors = zip(tensors[: len(regions)], tensors[len(regions) :], strict=True)
        grids = [(*region, left, right) for region, (left, right) in zip(regions, factors, strict=True)]
        return weight_of_tiles(self.layer, grids)

    def forms(self) -> tuple[Layout, ...]:
        return (self,) if self.run else (replace(self, run="dense"), replace(self, run="factors"))

    def build(self, bias: bool) -> nn.Module:
        return TiledLayer(self.layer, self.tile, self.rank, bias, self.run or "dense")

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        regions = len(tensors) // 2
        left = {f"left.{i}": tensor for i, tensor in enumerate(tensors[:regions])}
        right = {f"right.{i}": tensor for i, tensor in enumerate(tensors[regions:])}
        return {**left, **right, **({} if bias is None else {"bias": bias})}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(parameter for name, parameter in module.named_parameters() if name != "bias")

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """All left factors in a row of tiles together, as if outputs weighed alike."""
        _, inputs = lowered_roots(metric)
        matrices = lowered(target, self.layer)
        regions, count = tile_regions(self.layer, self.tile), len(tensors) // 2
        lefts, rights = [x.clone() for x in tensors[:count]], tensors[count:]
        for row in dict.fromkeys(row for row, _ in regions):
            places = [i for i, (other, _) in enumerate(regions) if other == row]
            for tile in range(row.tiles):
                start = row.start + tile * row.size
                part, seen = matrices[:, start : start + row.size], self._seen(rights, places, tile)
                white = (part, seen) if inputs is None else (inputs.to(part.device).times(x) for x in (part, seen))
                found = regress(*white).split([lefts[i].shape[2] for i in places], dim=2)
                for i, each in zip(places, found, strict=True):
                    lefts[i].unflatten(0, (self.layer.groups, -1))[:, tile] = each
        return *lefts, *rights

    def _seen(self, rights: Sequence[Tensor], places: Sequence[int], tile: int) -> Tensor:
        """What the left factors of one row of tiles are applied to, of these regions: `[g, n r, columns]`."""
        rows, regions = [], tile_regions(self.layer, self.tile)
        for i in places:
            row, column = regions[i]
            blocks = rights[i].unflatten(0, (self.layer.groups, -1)).unflatten(2, (row.tiles, -1))[:, :, tile]
            spread = blocks.new_zeros(*blocks.shape[:3], column.tiles, column.size)
            each = torch.arange(column.tiles)
            spread[:, each, :, each] = blocks.transpose(0, 1)  # indices apart move to the front
            rows.append((column, spread.flatten(3).flatten(1, 2)))
        width = max(column.stop for column, _ in rows)
        return torch.cat([F.pad(x, (column.start, width - column.stop)) for column, x in rows], dim=1)

    def describe(self) -> str:
        return f"tiles of {self.tile}, rank {self.rank}"

    @property
    def note(self) -> str:
        return _NOTES.get(self.run or "", "")

    def to_dict(self) -> dict[str, Any]:
        shape = {"layer": self.layer.to_dict(), "tile": self.tile, "rank": self.rank}
        return {"kind": "tiles", **shape, "run": self.run or "dense"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Tiles | None:
        """None where the tiles do not fit the layer. Raises `ValueError` where they are of something else."""
        if values.get("kind") != "tiles" or values.get("run") not in tuple(_NOTES):
            return None
        tile, rank, spec = values.get("tile"), values.get("rank"), LayerSpec.from_dict(values.get("layer"))
        if spec != layer.with_(inputs=(), share=1.0) or type(tile) is not int or type(rank) is not int:
            return None
        return cls(layer, tile, rank, values["run"]) if 1 <= rank <= tile <= tile_side(spec, tile) else None
