"""Deployed layers: ordinary ones built from a `LayerSpec`, and those that plain `nn` cannot express."""

from lowrank_pl.layers.attention import SplitAttention, attention_inputs
from lowrank_pl.layers.chain import FactorChain
from lowrank_pl.layers.constant import ConstantLayer
from lowrank_pl.layers.grouped_linear import GroupedLinear
from lowrank_pl.layers.lazy_weight import LazyWeight
from lowrank_pl.layers.ordinary import LAYER_TYPES, as_operator, as_stored, build, spec_of
from lowrank_pl.layers.recurrent import SplitRecurrent, recurrent_inputs
from lowrank_pl.layers.tiled import Run, TiledLayer, factor_shapes, lowered, tile_regions, tile_side, weight_of_tiles

__all__ = [
    "LAYER_TYPES",
    "ConstantLayer",
    "FactorChain",
    "GroupedLinear",
    "LazyWeight",
    "Run",
    "SplitAttention",
    "SplitRecurrent",
    "TiledLayer",
    "as_operator",
    "as_stored",
    "attention_inputs",
    "build",
    "factor_shapes",
    "lowered",
    "recurrent_inputs",
    "spec_of",
    "tile_regions",
    "tile_side",
    "weight_of_tiles",
]
