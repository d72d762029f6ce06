"""Structures that a weight can be projected onto, one file each."""

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.block_svd import BlockSVD
from lowrank_pl.decompositions.cheapest import Cheapest, alternatives, chosen
from lowrank_pl.decompositions.spatial_svd import SpatialSVD
from lowrank_pl.decompositions.structure import (
    Chain,
    Constant,
    Dense,
    Rank,
    Structure,
    Tiles,
    count_macs,
    count_weights,
    module_from_dict,
)
from lowrank_pl.decompositions.svd import SVD
from lowrank_pl.decompositions.tiled_svd import TiledSVD
from lowrank_pl.decompositions.tucker2 import Tucker2

__all__ = [
    "SVD",
    "BlockSVD",
    "Chain",
    "Cheapest",
    "Constant",
    "Decomposition",
    "Dense",
    "Rank",
    "SpatialSVD",
    "Structure",
    "TiledSVD",
    "Tiles",
    "Tucker2",
    "alternatives",
    "chosen",
    "count_macs",
    "count_weights",
    "module_from_dict",
]
