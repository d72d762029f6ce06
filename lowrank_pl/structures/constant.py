"""A weight of rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import ConstantLayer
from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout


@final
@dataclass(frozen=True)
class Constant(Layout):
    """The bias alone. Its one tensor is empty: it carries the type and the device."""

    layer: LayerSpec

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        return ()

    @property
    def macs(self) -> int | None:
        return 0

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),)

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_zeros(self.layer.stored_shape)

    def build(self, bias: bool) -> nn.Module:
        return ConstantLayer(self.layer, bias)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        return {} if bias is None else {"bias": bias}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        like = next(module.parameters(), torch.empty(0))
        return (like.new_empty(0),)

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        return tuple(tensors)

    def describe(self) -> str:
        return "constant"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "constant"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Constant | None:
        """None for anything else than what `to_dict` gives."""
        return cls(layer) if values == {"kind": "constant"} else None
