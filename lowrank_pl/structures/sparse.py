"""A weight most of which is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SparseLayer, SparseRun, has_bits, index_shape, sparse_weight
from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout, total_macs
from lowrank_pl.structures.sweeps import nearest

_NOTES = {"dense": "sparse part runs dense", "csr": "sparse part skips zeros"}


@final
@dataclass(frozen=True)
class Sparse(Layout):
    """So many values `[nonzeros]`, in the order in which PyTorch stores the weight, and where they stand, as
    `lowrank_pl.layers.packed` says it: its two tensors. Zeros are not stored, so that nothing can move them.

    `run` says whether they are multiplied, `"dense"`, or skipped, `"csr"`; None leaves it open, which is dense until
    something has been measured.
    """

    layer: LayerSpec
    nonzeros: int
    run: SparseRun | None = None

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        """A product for every value, at every position, zeros being skipped."""
        layer, count = self.layer, self.nonzeros
        if not count:
            return ()
        return (LayerSpec("linear", count, count, groups=count, inputs=layer.positions, share=layer.share),)

    @property
    def macs(self) -> int | None:
        return total_macs(self.stages) if self.run == "csr" and self.stages else self.layer.macs

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

    def forms(self) -> tuple[Layout, ...]:
        return (self,) if self.run else (replace(self, run="dense"), replace(self, run="csr"))

    def of_factors(self) -> Sparse:
        return replace(self, run="csr")

    def build(self, bias: bool) -> nn.Module:
        return SparseLayer(self.layer, self.nonzeros, bias, self.run or "dense")

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

    @property
    def note(self) -> str:
        return _NOTES.get(self.run or "", "")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "sparse", "nonzeros": self.nonzeros, "run": self.run or "dense"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Sparse | None:
        """None for anything else than what `to_dict` gives, and for more values than the layer has."""
        count, run = values.get("nonzeros"), values.get("run")
        if values != {"kind": "sparse", "nonzeros": count, "run": run} or type(count) is not int:
            return None
        return cls(layer, count, run) if 0 <= count <= layer.num_weights and run in tuple(_NOTES) else None
