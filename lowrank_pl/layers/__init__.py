"""Deployed layers: ordinary ones built from a `LayerSpec`, and those that plain `nn` cannot express."""

from lowrank_pl.layers.attention import SplitAttention, attention_inputs
from lowrank_pl.layers.chain import FactorChain
from lowrank_pl.layers.constant import ConstantLayer
from lowrank_pl.layers.factored import FactoredEmbedding, FactoredExperts, FactoredParameter, tied
from lowrank_pl.layers.grouped_linear import GroupedLinear
from lowrank_pl.layers.lazy_weight import Factors, LazyWeight, Made, Source
from lowrank_pl.layers.lowering import lowered_inputs, lowered_outputs
from lowrank_pl.layers.ordinary import LAYER_TYPES, as_operator, as_stored, build, heard_inputs, linear_of, spec_of
from lowrank_pl.layers.recurrent import SplitRecurrent, matrix_names, recurrent_inputs
from lowrank_pl.layers.some_channels import SomeChannelsLayer, numbered, of_channels, places_of, spread, widened
from lowrank_pl.layers.sparse import SparseLayer, has_bits, index_shape, packed, sparse_weight
from lowrank_pl.layers.stacked_linear import StackedLinear
from lowrank_pl.layers.sum import SumLayer
from lowrank_pl.layers.tiled import Run, TiledLayer, factor_shapes, lowered, tile_regions, tile_side, weight_of_tiles

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
    TiledLayer,
)

__all__ = [
    "DEPLOYED",
    "LAYER_TYPES",
    "ConstantLayer",
    "FactorChain",
    "FactoredEmbedding",
    "FactoredExperts",
    "FactoredParameter",
    "Factors",
    "GroupedLinear",
    "LazyWeight",
    "Made",
    "Run",
    "SomeChannelsLayer",
    "Source",
    "SparseLayer",
    "SplitAttention",
    "SplitRecurrent",
    "StackedLinear",
    "SumLayer",
    "TiledLayer",
    "as_operator",
    "as_stored",
    "attention_inputs",
    "build",
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
    "recurrent_inputs",
    "sparse_weight",
    "spec_of",
    "spread",
    "tied",
    "tile_regions",
    "tile_side",
    "weight_of_tiles",
    "widened",
]
