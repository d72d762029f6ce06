"""Several structures side by side, whose outputs are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SumLayer
from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout, in_type


@final
@dataclass(frozen=True)
class Sum(Layout):
    """Its parts are layouts of the same layer, each fed with the layer's own inputs; its tensors are theirs, part after
    part. The bias is that of the first part."""

    layer: LayerSpec
    parts: tuple[Layout, ...]

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        return tuple(stage for part in self.parts for stage in part.stages)

    @property
    def macs(self) -> int | None:
        macs = [part.macs for part in self.parts]
        return None if None in macs else sum(n for n in macs if n is not None)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for part in self.parts for shape in part.shapes())

    @property
    def num_weights(self) -> int:
        return sum(part.num_weights for part in self.parts)

    @property
    def index_bytes(self) -> int:
        return sum(part.index_bytes for part in self.parts)

    def split(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The tensors of each part."""
        found, start = [], 0
        for part in self.parts:
            count = len(part.shapes())
            found.append(tensors[start : start + count])
            start += count
        return found

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        first, *others = self._weights(self.split(tensors))
        for other in others:
            first = first + other
        return first

    def forms(self) -> tuple[Layout, ...]:
        return tuple(Sum(self.layer, parts) for parts in product(*(part.forms() for part in self.parts)))

    def build(self, bias: bool) -> nn.Module:
        return SumLayer([part.build(bias and i == 0) for i, part in enumerate(self.parts)], self)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for i, (part, own) in enumerate(zip(self.parts, self.split(tensors), strict=True)):
            parameters = part.parameters(own, bias if i == 0 else None)
            named |= {f"branches.{i}.{name}": value for name, value in parameters.items()}
        return named

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        branches = [module.get_submodule(f"branches.{i}") for i in range(len(self.parts))]
        return tuple(x for part, own in zip(self.parts, branches, strict=True) for x in part.tensors(own))

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """Part after part, each to what the others leave of the target."""
        each = self.split(in_type(tensors, target.dtype))
        for i, part in enumerate(self.parts):
            rest = target
            for k, other in enumerate(self._weights(each)):
                rest = rest if k == i else rest - other
            each[i] = part.refit(each[i], rest, metric)
        return tuple(x for own in each for x in own)

    def _weights(self, each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [part.weight(own) for part, own in zip(self.parts, each, strict=True)]

    def describe(self) -> str:
        return " + ".join(part.describe() for part in self.parts)

    @property
    def note(self) -> str:
        return "; ".join(filter(None, (part.note for part in self.parts)))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sum", "parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], layer: LayerSpec, read: Callable[[Any, LayerSpec], Layout]
    ) -> Sum | None:
        """None for anything else than what `to_dict` gives, and for sums of sums; `read` raises `ValueError` for a part
        that is no layout of the layer."""
        stored = values.get("parts")
        if values.get("kind") != "sum" or not isinstance(stored, list) or len(stored) < 2:
            return None
        if any(isinstance(part, dict) and part.get("kind") == "sum" for part in stored):
            return None
        return cls(layer, tuple(read(part, layer) for part in stored))
