"""The cores of a tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import (
    MOST_CORES,
    Run,
    TTLayer,
    bonds,
    core_products,
    core_shapes,
    total_products,
    weight_of_cores,
)
from lowrank_pl.linalg import regress
from lowrank_pl.metric import Metric
from lowrank_pl.structures.two_forms import NOTES, TwoForms


@final
@dataclass(frozen=True)
class Cores(TwoForms):
    """A linear layer of `prod(rows)` outputs and `prod(columns)` inputs as `[r_(k-1), rows[k], columns[k], r_k]`, every
    rank between two cores `rank` or the largest that there is: the parameters of a `TTLayer`.

    `run` says how the layer computes; None leaves it open, which is in fewer multiply-adds until something has been
    measured.
    """

    layer: LayerSpec
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rank: int
    run: Run | None = None

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        """Its cores as matrices, in the order in which they take fewer multiply-adds."""
        _, products = core_products(self.shapes())
        return tuple(
            LayerSpec(
                "linear",
                inputs,
                outputs,
                inputs=tuple((vectors * count,) for (vectors,) in self.layer.inputs),
                share=self.layer.share,
            )
            for inputs, outputs, count in products
        )

    @property
    def unmeasured(self) -> Run:
        _, products = core_products(self.shapes())
        return "factors" if total_products(products) <= self.layer.num_weights else "dense"

    def running(self, run: Run) -> Cores:
        return replace(self, run=run)

    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return core_shapes(self.rows, self.columns, self.rank)

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        return weight_of_cores(tensors).squeeze(2)

    def products(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(len(self.rows))),)

    def build(self, bias: bool) -> nn.Module:
        return TTLayer(self.layer, self.rows, self.columns, self.rank, bias, self.run or self.unmeasured)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        cores = {f"cores.{k}": tensor for k, tensor in enumerate(tensors)}
        return {**cores, **({} if bias is None else {"bias": bias})}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        return tuple(module.get_parameter(f"cores.{k}") for k in range(len(self.rows)))

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """The last core, as if outputs weighed alike."""
        *others, last = tensors
        r, m, n, _ = last.shape
        unit = torch.eye(r * n, dtype=last.dtype, device=last.device).reshape(r, 1, n, r * n)
        seen = weight_of_cores([*others, unit]).permute(2, 0, 1)  # what each number of one of its rows adds
        white = metric.whiten(seen.flatten(0, 1).unsqueeze(0)).reshape(r * n, -1)
        wanted = metric.whiten(target.unsqueeze(0)).unflatten(1, (-1, m)).transpose(1, 2).reshape(m, -1)
        return *others, regress(wanted, white).reshape(m, r, n, 1).transpose(0, 1)

    def describe(self) -> str:
        return f"cores {' '.join(f'{m}x{n}' for m, n in zip(self.rows, self.columns, strict=True))}, rank {self.rank}"

    def to_dict(self) -> dict[str, Any]:
        shape = {"rows": list(self.rows), "columns": list(self.columns), "rank": self.rank}
        return {"kind": "tensor_train", **shape, "run": self.run or self.unmeasured}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Cores | None:
        """None where the cores do not fit the layer."""
        if values.get("kind") != "tensor_train" or values.get("run") not in tuple(NOTES):
            return None
        rows, columns = (_sizes(values.get(key)) for key in ("rows", "columns"))
        rank, matrix = values.get("rank"), (math.prod(rows), math.prod(columns))
        if layer.kind != "linear" or layer.groups > 1 or matrix != (layer.out_channels, layer.in_channels):
            return None
        if not 1 < len(rows) == len(columns) <= MOST_CORES or type(rank) is not int:
            return None
        fits = 1 <= rank <= max(bonds([m * n for m, n in zip(rows, columns, strict=True)]))
        return cls(layer, rows, columns, rank, values["run"]) if fits else None


def _sizes(values: Any) -> tuple[int, ...]:
    """Of a list from elsewhere; none where it is no such list."""
    right = isinstance(values, list) and all(type(n) is int and n >= 1 for n in values[: MOST_CORES + 1])
    return tuple(values[: MOST_CORES + 1]) if right else ()
