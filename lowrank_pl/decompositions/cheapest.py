"""A choice among structures, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lowrank_pl.decompositions.base import Candidates, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.names import resolve


@final
@dataclass(frozen=True, init=False)
class Cheapest(Candidates):
    """Whichever of several structures is worth its cost, chosen together with the rank.

    `Cheapest("svd", "spatial_svd", Tucker2())`. Only for rules that weigh errors against costs (`CostPenalty`,
    `CostBudget`, `GreedyEnergy`) and for learning-compression.
    """

    members: tuple[Decomposition, ...]

    def __init__(self, *members: str | Decomposition) -> None:
        if not members:
            raise TypeError('Expected structures to choose among, such as Cheapest("svd", "spatial_svd")')
        each = [resolve(member, Decomposition, "method")["*"] for member in members]  # type: ignore[type-abstract]
        object.__setattr__(self, "members", tuple(each))

    def unsupported(self, layer: LayerSpec) -> str | None:
        reasons = [member.unsupported(layer) for member in self.members]
        return None if None in reasons else " and ".join(reason for reason in reasons if reason)

    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return tuple(member for member in self.members if member.unsupported(layer) is None)
