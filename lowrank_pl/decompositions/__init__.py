"""Structures that a weight can be projected onto, one file each."""

from lowrank_pl.decompositions.base import DENSE, ZERO, Analysis, Candidates, Choice, Decomposition
from lowrank_pl.decompositions.block_svd import BlockSVD
from lowrank_pl.decompositions.cheapest import Cheapest
from lowrank_pl.decompositions.cp import CP
from lowrank_pl.decompositions.first_of import FirstOf
from lowrank_pl.decompositions.low_rank_plus_columns import LowRankPlusColumns
from lowrank_pl.decompositions.low_rank_plus_sparse import LowRankPlusSparse
from lowrank_pl.decompositions.separable_svd import SeparableSVD
from lowrank_pl.decompositions.spatial_svd import SpatialSVD
from lowrank_pl.decompositions.svd import SVD
from lowrank_pl.decompositions.tensor_train import TensorTrain
from lowrank_pl.decompositions.tiled_svd import TiledSVD
from lowrank_pl.decompositions.tucker2 import Tucker2

__all__ = [
    "CP",
    "DENSE",
    "SVD",
    "ZERO",
    "Analysis",
    "BlockSVD",
    "Candidates",
    "Cheapest",
    "Choice",
    "Decomposition",
    "FirstOf",
    "LowRankPlusColumns",
    "LowRankPlusSparse",
    "SeparableSVD",
    "SpatialSVD",
    "TensorTrain",
    "TiledSVD",
    "Tucker2",
]
