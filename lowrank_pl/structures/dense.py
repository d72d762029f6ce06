"""A weight kept as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import build
from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout


@final
@dataclass(frozen=True)
class Dense(Layout):
    """The layer itself, because nothing allowed here is cheaper; its tensor is the weight as PyTorch stores it."""

    layer: LayerSpec

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        return (self.layer,)

    @property
    def macs(self) -> int | None:
        return self.layer.macs

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.layer.stored_shape,)

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def build(self, bias: bool) -> nn.Module:
        return build(self.layer, bias)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        return {"weight": tensors[0], **({} if bias is None else {"bias": bias})}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (weight,)

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        return (target,)

    def describe(self) -> str:
        return "dense"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "dense"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Dense | None:
        """None for anything else than what `to_dict` gives."""
        return cls(layer) if values == {"kind": "dense"} else None
