"""A choice among structures, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from lowrank_pl.choices import resolve
from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.structure import Rank, Structure
from lowrank_pl.layer_spec import LayerSpec


@final
@dataclass(frozen=True, init=False)
class Cheapest(Decomposition):
    """Whichever of several structures is worth its cost, chosen together with the rank.

    `Cheapest("svd", "spatial_svd", Tucker2())`. The rank is (i, ...): the number of the structure, then its own rank.
    Only for rules that weigh errors against costs (`CostPenalty`, `CostBudget`, `GreedyEnergy`) and for
    learning-compression.
    """

    members: tuple[Decomposition, ...]

    def __init__(self, *members: Any) -> None:
        if not members:
            raise TypeError('Expected structures to choose among, such as Cheapest("svd", "spatial_svd")')
        each = [resolve(member, Decomposition, "method")["*"] for member in members]  # type: ignore[type-abstract]
        object.__setattr__(self, "members", tuple(each))

    def unsupported(self, layer: LayerSpec) -> str | None:
        reasons = [member.unsupported(layer) for member in self.members]
        return None if None in reasons else " and ".join(reason for reason in reasons if reason)

    def full_rank(self, layer: LayerSpec) -> Rank:
        i = next(i for i, member in enumerate(self.members) if member.unsupported(layer) is None)
        return (i, *self.members[i].full_rank(layer))

    def stages(self, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        return self.members[rank[0]].stages(layer, rank[1:])

    def spectra(self, weight: Tensor, layer: LayerSpec) -> tuple[Tensor, ...]:
        raise TypeError("Cheapest has a spectrum per structure, none of its own")

    def factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Structure:
        if not 0 <= rank[0] < len(self.members):
            raise ValueError(f"Expected the number of a structure below {len(self.members)} first in the rank {rank}")
        structure: Any = self.members[rank[0]].factor(weight, layer, rank[1:])
        return replace(structure, rank=rank)

    def _factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Structure:
        raise NotImplementedError("each structure checks its own rank")


def alternatives(decomposition: Decomposition, layer: LayerSpec) -> list[tuple[Rank, Decomposition]]:
    """The structures to choose among for this layer, each with what its ranks begin with."""
    if not isinstance(decomposition, Cheapest):
        return [((), decomposition)]
    return [((i,), member) for i, member in enumerate(decomposition.members) if member.unsupported(layer) is None]


def chosen(decomposition: Decomposition, rank: Rank) -> tuple[Decomposition, Rank]:
    """The structure that a rank is of, and the rank in its own terms."""
    if isinstance(decomposition, Cheapest):
        return decomposition.members[rank[0]], rank[1:]
    return decomposition, rank
