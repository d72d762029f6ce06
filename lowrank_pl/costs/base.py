"""What a cost is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lowrank_pl.decompositions import Choice, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.structures import Layout, Rank

Cost = Callable[[LayerSpec], float]


class StructureCost(ABC):
    """A cost that does not simply add up over the stages of a structure, such as time."""

    @abstractmethod
    def __call__(self, layer: LayerSpec) -> float:
        """Of a dense layer."""

    @abstractmethod
    def of_structure(self, layer: LayerSpec, decomposition: Decomposition, rank: Rank) -> float:
        """Of a layer as this structure: [1, full] in every entry of the rank."""


def charge(cost: Cost, layer: LayerSpec) -> float:
    """What one stage costs. Raises `ValueError` for a function that does not give a finite number of at least 0."""
    value: Any = cost(layer)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"Expected argument `cost` to give a number of at least 0 but it gave {value!r} for {layer}")
    return number


def price(cost: Cost, choice: Choice, layout: Layout) -> float:
    """What the layout of a choice costs: at rank 0, without stages, nothing."""
    if isinstance(cost, StructureCost) and choice.decomposition is not None:
        return cost.of_structure(layout.layer, choice.decomposition, choice.rank)
    return sum(charge(cost, stage) for stage in layout.stages)
