"""A weight most of which is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SparseLayer, has_bits, index_shape, sparse_weight
from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout
from lowrank_pl.structures.sweeps import nearest


@final
@dataclass(frozen=True)
class Sparse(Layout):
    """So many values `[nonzeros]`, in the order in which PyTorch stores the weight, and where they stand, as
    `lowrank_pl.layers.packed` says it: its two tensors. Zeros are not stored, so that nothing can move them."""

    layer: LayerSpec
    nonzeros: int

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        """A product for every value, at every position: what it costs to skip the zeros."""
        layer, count = self.layer, self.nonzeros
        if not count:
            return ()
        return (LayerSpec("linear", count, count, groups=count, inputs=layer.positions, share=layer.share),)

    @property
    def macs(self) -> int | None:
        """As it runs, zeros are multiplied too."""
        return self.layer.macs

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.nonzeros,), index_shape(self.layer, self.nonzeros)

    @property
    def num_weights(self) -> int:
        return self.nonzeros

    @property
    def index_bytes(self) -> int:
        (count,) = index_shape(self.layer, self.nonzeros)
        return count if has_bits(self.layer, self.nonzeros) else 4 * count

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        values, where = tensors
        return sparse_weight(values, where, self.layer)

    def build(self, bias: bool) -> nn.Module:
        return SparseLayer(self.layer, self.nonzeros, bias)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        values, where = tensors
        return {"values": values, "where": where, **({} if bias is None else {"bias": bias})}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        return module.get_parameter("values"), module.get_buffer("where")

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """The values, where they stand, by a few steps of conjugate gradients."""
        values, where = tensors
        return nearest(self, [values.double(), where], 0, target.double(), metric), where

    def describe(self) -> str:
        return f"{self.nonzeros:,} nonzeros"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sparse", "nonzeros": self.nonzeros}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Sparse | None:
        """None for anything else than what `to_dict` gives, and for more values than the layer has."""
        count = values.get("nonzeros")
        if values != {"kind": "sparse", "nonzeros": count} or type(count) is not int:
            return None
        return cls(layer, count) if 0 <= count <= layer.num_weights else None
