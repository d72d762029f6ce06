"""A layer most of whose weights are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.dense_run import DenseRun, run_dense
from lowrank_pl.layers.lazy_weight import Made, weight_of_factors


@final
class SparseLayer(DenseRun):
    """A linear layer or convolution that stores `values` `[nonzeros]` and, in a buffer, `where` they stand.

    The values alone are trained, so that zeros stay zero under every optimizer, with momentum and weight decay. It runs
    dense, zeros multiplied too.
    """

    where: Tensor

    def __init__(self, spec: LayerSpec, nonzeros: int, bias: bool) -> None:
        super().__init__()
        self.spec, self.nonzeros = spec.with_(inputs=()), nonzeros
        fan_in = max(nonzeros / spec.out_channels, 1.0)
        self.values = nn.Parameter(torch.empty(nonzeros).normal_(std=fan_in**-0.5))
        self.register_buffer("where", packed(torch.arange(nonzeros), spec))
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        return weight_of_factors(self.values, self.spec.stored_shape, Made(self._weight))

    def dense_weight(self) -> Tensor:
        return sparse_weight(self.values, self.where, self.spec)

    def factors(self) -> Sequence[Tensor]:
        return self.values, self.where

    def forward(self, x: Tensor) -> Tensor:
        return run_dense(x, self._weight(), self.bias, self.spec)

    def extra_repr(self) -> str:
        return f"{self.nonzeros:,} of {self.spec.num_weights:,} weights"


def has_bits(spec: LayerSpec, nonzeros: int) -> bool:
    """Whether a bit for every weight takes no more bytes than a number for every value."""
    return -(-spec.num_weights // 8) <= 4 * nonzeros


def index_shape(spec: LayerSpec, nonzeros: int) -> tuple[int]:
    """That of what `packed` makes."""
    return (-(-spec.num_weights // 8),) if has_bits(spec, nonzeros) else (nonzeros,)


def packed(places: Tensor, spec: LayerSpec) -> Tensor:
    """Ascending places `[nonzeros]` in the flat weight, in as few bytes as may be: uint8, a bit for every weight, the
    lowest first, or the places themselves, int32."""
    if not has_bits(spec, len(places)):
        return places.to(torch.int32)
    bits = places.new_zeros(-(-spec.num_weights // 8) * 8, dtype=torch.uint8)
    bits[places.long()] = 1
    shifted = bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return shifted.sum(1, dtype=torch.uint8)


def sparse_weight(values: Tensor, where: Tensor, spec: LayerSpec) -> Tensor:
    """The weight, as PyTorch stores it."""
    flat = values.new_zeros(spec.num_weights)
    if where.dtype == torch.uint8:
        flat = flat.masked_scatter(mask_of(where, spec), values)
    else:
        flat = flat.scatter(0, where.long(), values)
    return flat.view(spec.stored_shape)


def mask_of(where: Tensor, spec: LayerSpec) -> Tensor:
    """The bits as a mask `[weights]`."""
    values = 2 ** torch.arange(8, dtype=torch.int32, device=where.device)
    bits = where.to(torch.int32).unsqueeze(1).div(values, rounding_mode="floor") % 2  # for ONNX without bit operations
    return bits.flatten()[: spec.num_weights].bool()
