"""A layer most of whose weights are zero."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.dense_run import DenseRun, run_dense, run_lowered
from lowrank_pl.layers.lazy_weight import Made, weight_of_factors
from lowrank_pl.layers.lowering import lowered

SparseRun = Literal["dense", "csr"]


@final
class SparseLayer(DenseRun):
    """A linear layer or convolution that stores `values` `[nonzeros]` and, in a buffer, `where` they stand.

    The values alone are trained, so that zeros stay zero under every optimizer, with momentum and weight decay. With
    `run="dense"` zeros are multiplied too, with `"csr"` they are skipped, in compressed sparse rows of the lowered
    matrix: without gradients, in float32 and float64, and where nothing is compiled or exported; else it runs dense.
    """

    where: Tensor

    def __init__(self, spec: LayerSpec, nonzeros: int, bias: bool, run: SparseRun = "dense") -> None:
        super().__init__()
        self.spec, self.nonzeros = spec.with_(inputs=()), nonzeros
        self.run: SparseRun = run
        fan_in = max(nonzeros / spec.out_channels, 1.0)
        self.values = nn.Parameter(torch.empty(nonzeros).normal_(std=fan_in**-0.5))
        self.register_buffer("where", packed(torch.arange(nonzeros) * spec.num_weights // max(nonzeros, 1), spec))
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        return weight_of_factors(self.values, self.spec.stored_shape, Made(self.dense_weight))

    def dense_weight(self) -> Tensor:
        return sparse_weight(self.values, self.where, self.spec)

    def factors(self) -> Sequence[Tensor]:
        return self.values, self.where

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if self.run == "csr" and plain and not torch.is_grad_enabled() and self._remembers():
            return run_lowered(x, self._multiply, self.bias, self.spec)
        weight = self.dense_weight() if self.run == "csr" else self._weight()
        return run_dense(x, weight, self.bias, self.spec)

    def _multiply(self, columns: Tensor) -> Tensor:
        batch = columns.transpose(0, 1)  # a matrix of all of it, so that the rows are gone through once
        y: Tensor = multiply_rows(*self._remembered(self._rows), batch.flatten(1)).unflatten(1, batch.shape[1:])
        return y.transpose(0, 1)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row of the lowered matrix, of all groups, begins among the values, their columns, the values."""
        mask = lowered(places_of(self.where, self.spec), self.spec)
        group, row, column = mask.nonzero().unbind(1)
        counts = torch.bincount(group * mask.shape[1] + row, minlength=mask.shape[0] * mask.shape[1])
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return begins, group * mask.shape[2] + column, lowered(self.dense_weight(), self.spec)[mask]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        given: Any = state_dict.get(f"{prefix}where")
        fits = isinstance(given, Tensor) and (given.dtype, given.shape) == (self.where.dtype, self.where.shape)
        if fits and not given.is_meta and not self._are_places(given):
            errors: list[str] = others[-1]
            expected = f"{self.nonzeros:,} ascending places of {self.spec.num_weights:,}"
            errors.append(f"{prefix}where: expected {expected}")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _are_places(self, where: Tensor) -> bool:
        if where.dtype == torch.uint8:
            return int(_mask_of(where, self.spec).sum()) == self.nonzeros
        inside = not len(where) or bool((where >= 0).all() and (where < self.spec.num_weights).all())
        return inside and bool((where.diff() > 0).all())

    def extra_repr(self) -> str:
        return f"{self.nonzeros:,} of {self.spec.num_weights:,} weights, run={self.run!r}"


_told: list[bool] = []


@contextmanager
def quiet_csr() -> Iterator[None]:
    """PyTorch warns once of all that it may lack for such matrices, of which this needs nothing but products."""
    if _told:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield
    _told.append(True)


@torch.library.custom_op("lowrank_pl::multiply_rows", mutates_args=())
def multiply_rows(begins: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A matrix in compressed sparse rows times `x` `[columns, n]`: PyTorch's counter takes that for dense."""
    shape = (len(begins) - 1, len(x))
    with quiet_csr():
        return torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False) @ x


@register_flop_formula(torch.ops.lowrank_pl.multiply_rows)
def _count(begins: Any, columns: Any, values: Any, x: Any, **_: Any) -> int:
    return 2 * int(values[0]) * int(x[1])


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
        flat = flat.masked_scatter(_mask_of(where, spec), values)
    else:
        flat = flat.scatter(0, where.long(), values)
    return flat.view(spec.stored_shape)


def places_of(where: Tensor, spec: LayerSpec) -> Tensor:
    """A mask of where values stand, in the weight as PyTorch stores it."""
    if where.dtype == torch.uint8:
        return _mask_of(where, spec).view(spec.stored_shape)
    mask = torch.zeros(spec.num_weights, dtype=torch.bool, device=where.device)
    return mask.index_fill(0, where.long(), True).view(spec.stored_shape)


def _mask_of(where: Tensor, spec: LayerSpec) -> Tensor:
    """The bits as a mask `[weights]`."""
    values = 2 ** torch.arange(8, dtype=torch.int32, device=where.device)
    bits = where.to(torch.int32).unsqueeze(1).div(values, rounding_mode="floor") % 2  # for ONNX without bit operations
    return bits.flatten()[: spec.num_weights].bool()
