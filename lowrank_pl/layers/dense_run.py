"""What a layer that holds something else than a weight needs, to run as the dense layer does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.grouped_linear import grouped_linear
from lowrank_pl.layers.lowering import margins_of

T = TypeVar("T")

_CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class DenseRun(nn.Module, ABC):
    """A layer that rebuilds its dense weight once, when first used without gradients, and again whenever something that
    it is made of has changed. Copies and pickles go without it. What is written through `.data` or as a numpy array is
    noticed only when it changes between training and evaluation, since PyTorch counts no version then."""

    def __init__(self) -> None:
        super().__init__()
        self._dense: tuple[Any, Any] | None = None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight, as PyTorch stores it, for autograd to follow."""

    @abstractmethod
    def factors(self) -> Sequence[Tensor]:
        """The tensors that it is made of."""

    def _weight(self) -> Tensor:
        return self._remembered(self.dense_weight)

    def _remembers(self) -> bool:
        factors = self.factors()
        wants_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        return not (wants_grad or is_traced() or factors[0].is_inference())  # the last ones are without versions

    def _remembered(self, make: Callable[[], T]) -> T:
        """What is made of the factors, always the same."""
        if not self._remembers():
            return make()
        factors = self.factors()
        key = [(factor.data_ptr(), factor._version) for factor in factors]
        if self._dense is None or self._dense[0] != key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(factors[0].device.type, enabled=False),
            ):
                self._dense = key, make()
        made: T = self._dense[1]
        return made

    def train(self, mode: bool = True) -> DenseRun:
        if mode != self.training:
            self._dense = None
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> DenseRun:
        self._dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}


def is_traced() -> bool:
    """Whether what runs now is being written down, to run again elsewhere."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def run_lowered(x: Tensor, multiply: Callable[[Tensor], Tensor], bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """What a layer makes of `x` whose lowered matrices multiply columns `[B, S d d, P]` to `[B, T, P]`; of transposed
    convolutions `[B, S, P]` to `[B, T d d, P]`."""
    y: Tensor
    if spec.kind == "linear":
        y = multiply(x.reshape(1, -1, x.shape[-1]).mT).mT.reshape(*x.shape[:-1], spec.out_channels)
        return y if bias is None else y + bias.to(y.dtype)
    axes = len(spec.kernel)
    if x.dim() == axes + 1:
        return run_lowered(x.unsqueeze(0), multiply, bias, spec).squeeze(0)
    size = spec.with_(inputs=((1, *x.shape[2:]),)).outputs[0][1:]
    if spec.kind == "conv_transpose":
        y = _fold(multiply(x.flatten(2)), spec, x.shape[2:], size)
    else:
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        y = multiply(_unfold(F.pad(x, margins_of(spec), mode=mode), spec)).unflatten(2, size)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * axes)


def _unfold(x: Tensor, spec: LayerSpec) -> Tensor:
    """The patches, `[B, S, *size]` to `[B, S d d, P]`: `F.unfold`, which is for two axes only."""
    axes = len(spec.kernel)
    for axis, (kernel, stride, dilation) in enumerate(zip(spec.kernel, spec.stride, spec.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    windows = x.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return windows.flatten(2 + axes).flatten(1, 1 + axes)


def _fold(columns: Tensor, spec: LayerSpec, places: Sequence[int], size: tuple[int, ...]) -> Tensor:
    """The patches `[B, T d d, P]` added up, each where its input stands: `[B, T, *size]`."""
    patches = columns.unflatten(2, tuple(places)).unflatten(1, (spec.out_channels, math.prod(spec.kernel)))
    margins = [int(p) for p in spec.padding]
    y = columns.new_zeros(*patches.shape[:2], *(n + 2 * p for n, p in zip(size, margins, strict=True)))
    axes = list(zip(spec.dilation, spec.stride, places, strict=True))
    for i, position in enumerate(product(*map(range, spec.kernel))):
        steps = (slice(d * k, d * k + s * (n - 1) + 1, s) for k, (d, s, n) in zip(position, axes, strict=True))
        reached: tuple[Any, ...] = (..., *steps)
        y[reached] += patches[:, :, i]
    inside: tuple[Any, ...] = (..., *(slice(p, p + n) for p, n in zip(margins, size, strict=True)))
    return y[inside]


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
