"""Rules that choose ranks, one file each."""

from lowrank_pl.ranks.admm_ranks import ADMMRanks
from lowrank_pl.ranks.base import Others, RankProblem, RankRule
from lowrank_pl.ranks.compression_ratio import CompressionRatio
from lowrank_pl.ranks.cost_budget import CostBudget
from lowrank_pl.ranks.cost_penalty import CostPenalty
from lowrank_pl.ranks.energy_threshold import EnergyThreshold
from lowrank_pl.ranks.enumeration import Enumeration, enumerate_ranks
from lowrank_pl.ranks.evbmf import EVBMF
from lowrank_pl.ranks.fixed_rank import FixedRank
from lowrank_pl.ranks.greedy_energy import GreedyEnergy
from lowrank_pl.ranks.multiple_of import MultipleOf
from lowrank_pl.ranks.rank_fraction import RankFraction

__all__ = [
    "EVBMF",
    "ADMMRanks",
    "CompressionRatio",
    "CostBudget",
    "CostPenalty",
    "EnergyThreshold",
    "Enumeration",
    "FixedRank",
    "GreedyEnergy",
    "MultipleOf",
    "Others",
    "RankFraction",
    "RankProblem",
    "RankRule",
    "enumerate_ranks",
]
