"""Costs that are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lowrank_pl.layer_spec import LayerSpec


@final
@dataclass(frozen=True)
class Params:
    """Weights of the factors; biases and norms apart."""

    def __call__(self, layer: LayerSpec) -> float:
        return layer.num_weights


@final
@dataclass(frozen=True)
class Macs:
    """Multiply-adds for one input of the network: of every stage that is deployed, as it will run."""

    def __call__(self, layer: LayerSpec) -> float:
        if layer.macs is None:
            raise ValueError(
                "Expected layers that have been seen to run, since multiply-adds depend on the size of their inputs: "
                "give `example_input`, or take cost='params'"
            )
        return layer.macs
