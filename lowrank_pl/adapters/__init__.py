"""What kinds of modules hold linear maps, and how to get at them; one file for each."""

from lowrank_pl.adapters.attention import Attention
from lowrank_pl.adapters.base import Adapter, LinearMap
from lowrank_pl.adapters.computed import release_
from lowrank_pl.adapters.parameters import Experts, ReshapedParameters
from lowrank_pl.adapters.recurrent import Recurrent
from lowrank_pl.adapters.registry import find_maps, obstacles, register_adapter
from lowrank_pl.adapters.row_blocks import RowBlocks

__all__ = [
    "Adapter", "Attention", "Experts", "LinearMap", "Recurrent", "ReshapedParameters", "RowBlocks", "find_maps",
    "obstacles", "register_adapter", "release_",
]  # fmt: skip
