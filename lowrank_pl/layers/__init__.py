"""Deployed layers: ordinary ones built from a `LayerSpec`, and those that plain `nn` cannot express."""

from lowrank_pl.layers.constant import ConstantLayer
from lowrank_pl.layers.grouped_linear import GroupedLinear
from lowrank_pl.layers.ordinary import LAYER_TYPES, as_operator, as_stored, build, build_with, spec_of
from lowrank_pl.layers.tiled import Run, TiledLayer, tile_regions

__all__ = [
    "LAYER_TYPES",
    "ConstantLayer",
    "GroupedLinear",
    "Run",
    "TiledLayer",
    "as_operator",
    "as_stored",
    "build",
    "build_with",
    "spec_of",
    "tile_regions",
]
