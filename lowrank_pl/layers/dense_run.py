"""What a layer that holds something else than a weight needs, to run as the dense layer does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.grouped_linear import grouped_linear
from lowrank_pl.layers.lowering import margins_of

_CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class DenseRun(nn.Module, ABC):
    """A layer that rebuilds its dense weight once, when first used without gradients, and again whenever something that
    it is made of has changed. Copies and pickles go without it."""

    def __init__(self) -> None:
        super().__init__()
        self._dense: tuple[Any, Tensor] | None = None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight, as PyTorch stores it, for autograd to follow."""

    @abstractmethod
    def factors(self) -> Sequence[Tensor]:
        """The tensors that it is made of."""

    def _weight(self) -> Tensor:
        factors = self.factors()
        wants_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if wants_grad or traced or factors[0].is_inference():  # the last ones are without versions
            return self.dense_weight()
        key = [(factor.data_ptr(), factor._version) for factor in factors]
        if self._dense is None or self._dense[0] != key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(factors[0].device.type, enabled=False),
            ):
                self._dense = key, self.dense_weight()
        return self._dense[1]

    def _apply(self, fn: Any, recurse: bool = True) -> DenseRun:
        self._dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}


def run_dense(x: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """What the dense layer makes of `x`."""
    if spec.kind == "linear":
        return grouped_linear(x, weight, bias, spec.groups)
    y: Tensor
    axes = len(spec.kernel)
    if spec.kind == "conv_transpose":
        amounts: Any = (spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation)
        y = _TRANSPOSED[axes](x, weight, bias, *amounts)
        return y
    padding: Any = spec.padding
    if spec.padding_mode != "zeros":
        x, padding = F.pad(x, margins_of(spec), mode=spec.padding_mode), 0
    y = _CONVS[axes](x, weight, bias, spec.stride, padding, spec.dilation, spec.groups)
    return y
