"""What kinds of modules hold linear maps, and how to get at them; one file for each."""

from lowrank_pl.adapters.base import Adapter, LinearMap
from lowrank_pl.adapters.parameters import Experts, ReshapedParameters
from lowrank_pl.adapters.registry import find_maps, obstacles, register_adapter

__all__ = ["Adapter", "Experts", "LinearMap", "ReshapedParameters", "find_maps", "obstacles", "register_adapter"]
