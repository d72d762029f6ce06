"""An order of structures, of which a layer gets the first that is for its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.several import Several
from lowrank_pl.layer_spec import LayerSpec


@final
@dataclass(frozen=True, init=False)
class FirstOf(Several):
    """The first of several structures that supports a layer: `FirstOf("tucker2", "svd")` is Tucker-2 for ungrouped
    convolutions and SVD for all else. A list or a tuple given as `method` means the same. For every rule."""

    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return tuple(member for member in self.members if member.unsupported(layer) is None)[:1]
