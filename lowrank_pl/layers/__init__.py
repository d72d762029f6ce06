"""Deployed layers: ordinary ones built from a `LayerSpec`, and those that plain `nn` cannot express."""

from lowrank_pl.layers.attention import SplitAttention, attention_inputs
from lowrank_pl.layers.chain import Between, FactorChain, scale_of
from lowrank_pl.layers.constant import ConstantLayer
from lowrank_pl.layers.factored import FactoredEmbedding, FactoredExperts, FactoredParameter, tied
from lowrank_pl.layers.grouped_linear import GroupedLinear
from lowrank_pl.layers.lazy_weight import Factors, LazyWeight, Made, Source
from lowrank_pl.layers.lowering import lowered, lowered_inputs, lowered_outputs, raised
from lowrank_pl.layers.ordinary import LAYER_TYPES, as_operator, as_stored, build, heard_inputs, linear_of, spec_of
from lowrank_pl.layers.rebuilding import RebuildingLayer, Run
from lowrank_pl.layers.recurrent import SplitRecurrent, matrix_names, recurrent_inputs
from lowrank_pl.layers.some_channels import (
    SomeChannelsLayer,
    numbered,
    of_channels,
    places_of,
    spread,
    widened,
)
from lowrank_pl.layers.sparse import (
    SparseLayer,
    SparseRun,
    has_bits,
    index_shape,
    packed,
    sparse_weight,
)
from lowrank_pl.layers.stacked_linear import StackedLinear
from lowrank_pl.layers.sum import SumLayer
from lowrank_pl.layers.tensor_train import (
    MOST_CORES,
    TTLayer,
    bonds,
    core_products,
    core_shapes,
    total_products,
    weight_of_cores,
)
from lowrank_pl.layers.tiled import (
    TiledLayer,
    factor_shapes,
    tile_regions,
    tile_side,
    weight_of_tiles,
)

# what compression puts into a network
DEPLOYED = (
    ConstantLayer,
    FactorChain,
    FactoredEmbedding,
    FactoredExperts,
    FactoredParameter,
    GroupedLinear,
    SparseLayer,
    SumLayer,
    SomeChannelsLayer,
    TTLayer,
    TiledLayer,
)

__all__ = [
    "DEPLOYED",
    "LAYER_TYPES",
    "MOST_CORES",
    "Between",
    "ConstantLayer",
    "FactorChain",
    "FactoredEmbedding",
    "FactoredExperts",
    "FactoredParameter",
    "Factors",
    "GroupedLinear",
    "LazyWeight",
    "Made",
    "RebuildingLayer",
    "Run",
    "SomeChannelsLayer",
    "Source",
    "SparseLayer",
    "SparseRun",
    "SplitAttention",
    "SplitRecurrent",
    "StackedLinear",
    "SumLayer",
    "TTLayer",
    "TiledLayer",
    "as_operator",
    "as_stored",
    "attention_inputs",
    "bonds",
    "build",
    "core_products",
    "core_shapes",
    "factor_shapes",
    "has_bits",
    "heard_inputs",
    "index_shape",
    "linear_of",
    "lowered",
    "lowered_inputs",
    "lowered_outputs",
    "matrix_names",
    "numbered",
    "of_channels",
    "packed",
    "places_of",
    "raised",
    "recurrent_inputs",
    "scale_of",
    "sparse_weight",
    "spec_of",
    "spread",
    "tied",
    "tile_regions",
    "tile_side",
    "total_products",
    "weight_of_cores",
    "weight_of_tiles",
    "widened",
]
