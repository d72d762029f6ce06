"""A choice among structures, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.several import Several
from lowrank_pl.layer_spec import LayerSpec


@final
@dataclass(frozen=True, init=False)
class Cheapest(Several):
    """Whichever of several structures is worth its cost, chosen together with the rank.

    `Cheapest("svd", "spatial_svd", Tucker2())`. Only for rules that weigh errors against costs (`CostPenalty`,
    `CostBudget`, `GreedyEnergy`) and for learning-compression.
    """

    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return tuple(member for member in self.members if member.unsupported(layer) is None)
