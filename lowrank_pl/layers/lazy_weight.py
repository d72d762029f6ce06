"""A weight that is not made before its values are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# what code asks of a weight without reading it
_PROPERTIES = ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
_QUESTIONS = frozenset({
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.__len__, Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex, Tensor.is_floating_point,
    Tensor.numel, Tensor.size, torch.is_complex, torch.is_floating_point, torch.numel,
})  # fmt: skip


class LazyWeight(Tensor):
    """Answers for its shape, type and device as `like` does; every other use gets the tensor that `make` gives.

    So `x.to(layer.weight.dtype)` costs nothing, and `F.linear(x, layer.weight)` computes and differentiates through
    what `make` does.
    """

    make: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, make: Callable[[], Tensor]) -> LazyWeight:
        weight: LazyWeight = Tensor._make_subclass(LazyWeight, like.detach(), like.requires_grad)
        weight.make = make
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(LazyWeight, lambda weight: weight.make(), (args, kwargs or {}))
        return func(*args, **kwargs)


def weight_of_factors(factor: Tensor, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """The weight of a layer that holds factors, of which `factor` is one; compiled and traced code gets it at once."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return make()
    # NaN, should anything past PyTorch's own operations look at its memory
    like = factor.detach().new_full((), torch.nan).expand(shape).requires_grad_(factor.requires_grad)
    return LazyWeight.of(like, make)
