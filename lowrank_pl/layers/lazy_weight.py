"""A weight that is not made before its values are needed, and not at all where it is only multiplied by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank_pl.layer_spec import LayerSpec

# what code asks of a weight without reading it
_PROPERTIES = ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
_QUESTIONS = frozenset({
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.__len__, Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_complex, Tensor.is_floating_point,
    Tensor.numel, Tensor.size, torch.is_complex, torch.is_floating_point, torch.numel,
})  # fmt: skip
_PRODUCTS = frozenset({
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__
})  # fmt: skip
_GROUPED = frozenset(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)
_TURNS = frozenset({Tensor.transpose, torch.transpose, torch.swapaxes, Tensor.swapaxes})
_MT = Tensor.mT.__get__  # type: ignore[attr-defined]
_FLIPS = frozenset({Tensor.T.__get__, _MT, Tensor.t, torch.t, *_TURNS})  # type: ignore[attr-defined]
_SINGLE = frozenset({Tensor.unbind, torch.unbind, Tensor.__iter__})
_CUTS = frozenset({Tensor.chunk, torch.chunk, Tensor.split, torch.split, *_SINGLE})
_ADDED = frozenset({torch.addmm, Tensor.addmm})


class Source(ABC):
    """What a `LazyWeight` `[..., T, S]` stands for. `rows` are indices on its first axis, one after another."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight itself."""

    @abstractmethod
    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Any:
        """`x W[rows]^T`, or with `transposed` `x W[rows]`; `product(x, matrix)` multiplies. None where only the dense
        weight can do that."""


class WeightLayout(Protocol):
    """What a module asks of its layout: which layer it stands for, and how its tensors make that layer's weight."""

    @property
    def layer(self) -> LayerSpec: ...

    def weight(self, tensors: tuple[Tensor, ...]) -> Tensor: ...

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]: ...


class LazyWeight(Tensor):
    """Answers for its shape, type and device as `like` does, and is multiplied by as its source can; every other use
    gets the dense tensor.

    So `x.to(layer.weight.dtype)` costs nothing, `F.linear(x, layer.weight)` and `x @ experts[i].T` compute with the
    factors, and `layer.weight + 1` computes and differentiates through their product.
    """

    source: Source
    rows: tuple[Any, ...]
    flipped: bool
    _is_param: bool

    @staticmethod
    def of(like: Tensor, source: Source, rows: tuple[Any, ...] = (), flipped: bool = False) -> LazyWeight:
        weight: LazyWeight = Tensor._make_subclass(LazyWeight, like.detach(), like.requires_grad)
        weight.source, weight.rows, weight.flipped = source, rows, flipped
        weight._is_param = True  # for `isinstance(weight, nn.Parameter)`, which code asks before it reads
        return weight

    def make(self) -> Tensor:
        """The dense tensor."""
        dense = self.source.dense()
        for index in self.rows:
            dense = dense[index]
        return dense.mT if self.flipped else dense

    def row(self, index: Any) -> LazyWeight:
        """Some of its first axis."""
        shape: tuple[int, ...] = self.shape[1:]
        if isinstance(index, slice):
            shape = (len(range(*index.indices(self.shape[0]))), *shape)
        elif isinstance(index, Tensor):
            shape = (*index.shape, *shape)
        return LazyWeight.of(_like(self, shape), self.source, (*self.rows, index))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUESTIONS:
                return func(*args, **kwargs)
            found = _part(func, args, kwargs)
            if found is None:
                found = _product(func, args, kwargs)
            if found is not None:
                return found
            args, kwargs = tree_map_only(LazyWeight, lambda weight: weight.make(), (args, kwargs))
        return func(*args, **kwargs)


def _like(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """NaN, should anything past PyTorch's own operations look at its memory."""
    like = torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(shape)
    return like.requires_grad_(weight.requires_grad)


def _part(func: Any, args: Any, kwargs: Any) -> Any:
    """A view that is lazy itself; None for what is none."""
    weight = args[0] if args else None
    if not isinstance(weight, LazyWeight) or weight.dim() < 2 or kwargs:
        return None
    if func in _FLIPS:
        return _flipped(weight, func, args[1:])
    if weight.flipped:
        return None
    if func is Tensor.__getitem__:
        return weight.row(args[1]) if _is_index(args[1], weight.dim() > 2) else None
    return _cut(weight, func, args[1:]) if func in _CUTS and len(args) <= 2 else None


def _flipped(weight: LazyWeight, func: Any, axes: tuple[int, ...]) -> LazyWeight | None:
    count = weight.dim()
    last_two = {axis % count for axis in axes} == {count - 1, count - 2}
    turns = last_two if func in _TURNS else count == 2 or func == _MT
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return LazyWeight.of(_like(weight, shape), weight.source, weight.rows, not weight.flipped) if turns else None


def _cut(weight: LazyWeight, func: Any, how: tuple[Any, ...]) -> tuple[LazyWeight, ...] | None:
    if func in _SINGLE:
        return tuple(weight.row(i) for i in range(len(weight))) if weight.dim() > 2 and not how else None
    lengths = [len(part) for part in func(torch.empty(len(weight), 0), *how)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return tuple(weight.row(slice(end - n, end)) for n, end in zip(lengths, ends, strict=True))


def _is_index(index: Any, is_batch: bool) -> bool:
    """Whether it takes rows: of a batch of matrices also a single one."""
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        return index.dim() == 1 or (is_batch and index.dim() == 0)
    return isinstance(index, slice) or (is_batch and type(index) is int)


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """A product of a tensor and a lazy weight; None for what is none."""
    y = None
    if func is F.linear:
        given = {"bias": None, **dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if _is_lazy(x, weight) == [False, True] and weight.dim() == 2:
            y = _multiply(weight, x, not weight.flipped, F.linear)
            y = y if y is None or bias is None else y + bias.to(y.dtype)
    elif func in _ADDED and _is_lazy(*args) == [False, False, True] and not kwargs:
        y = _multiply(args[2], args[1], args[2].flipped, _matmul)
        y = None if y is None else args[0] + y
    elif func in _GROUPED and _is_lazy(*args[:2]) == [False, True] and args[1].dim() == 3:
        y = _multiply(args[1], args[0], args[1].flipped, partial(_grouped, partial(func, **kwargs), args[2:]))
    elif func is torch.einsum and len(args) == 3 and not kwargs:
        y = _einsum(*args)
    elif func in _PRODUCTS and len(args) == 2 and not kwargs:
        x, weight = args[::-1] if func is Tensor.__rmatmul__ else args
        if _is_lazy(x, weight) == [False, True] and x.dim() > 1:
            y = _multiply(weight, x, weight.flipped, _matmul)
        elif _is_lazy(x, weight) == [True, False] and weight.dim() > 1:
            y = _multiply(x, weight.mT, not x.flipped, _matmul)
            y = None if y is None else y.mT
    return y


def _einsum(equation: Any, first: Any, second: Any) -> Any:
    """As a product of matrices, where a weight `[..., T, S]` gives outputs along T for inputs along S, or the other way
    round, for every matrix of a batch."""
    if not isinstance(equation, str) or "->" not in equation or "." in equation or sum(_is_lazy(first, second)) != 1:
        return None
    inputs, outs = equation.replace(" ", "").split("->")
    (xs, ws), (x, weight) = inputs.split(","), (first, second)
    if isinstance(first, LazyWeight):
        (ws, xs), (weight, x) = (xs, ws), (x, weight)
    if len(ws) != weight.dim() or len(xs) != x.dim() or len(ws) < 2:
        return None
    batch, rows, columns = ws[:-2], ws[-2], ws[-1]
    if rows in xs and columns in outs:
        rows, columns, by_columns = columns, rows, weight.flipped
    else:
        by_columns = not weight.flipped
    others = [label for label in xs if label not in batch + columns]
    plain = all(len(set(labels)) == len(labels) for labels in (xs, ws, outs))
    sums = set(others) <= set(outs) and rows in outs and rows not in xs and columns in xs and columns not in outs
    if not plain or not sums:
        return None
    x = x.permute(*(xs.index(label) for label in [*batch, *others, columns] if label in xs))
    sizes = x.shape[-len(others) - 1 : -1]
    for place, label in enumerate(batch):
        x = x if label in xs else x.unsqueeze(place)
    y = _multiply(weight, x.flatten(len(batch), -2) if others else x.unsqueeze(-2), by_columns, _matmul)
    if y is None:
        return None
    y = y.unflatten(-2, sizes) if others else y.squeeze(-2)
    labels = [*batch, *others, rows]
    y = y.sum([labels.index(label) for label in batch if label not in outs]) if set(batch) - set(outs) else y
    labels = [label for label in labels if label in outs]
    return y.permute(*(labels.index(label) for label in outs))


def _is_lazy(*args: Any) -> list[bool]:
    return [isinstance(arg, LazyWeight) for arg in args]


def _grouped(func: Any, others: tuple[Any, ...], x: Tensor, matrix: Tensor) -> Tensor:
    """`x matrix^T` by groups of rows; the operation wants rows of whole 16 bytes, which ranks need not be."""
    unit = 16 // x.element_size()
    columns, outputs = -x.shape[-1] % unit, -matrix.shape[-2] % unit
    y: Tensor = func(F.pad(x, (0, columns)), F.pad(matrix, (0, columns, 0, outputs)).mT, *others)
    return y[..., : matrix.shape[-2]]


def _matmul(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix.mT


def _multiply(weight: LazyWeight, x: Tensor, by_columns: bool, product: Callable[..., Tensor]) -> Any:
    """`x V^T` (by columns) or `x V`, of the rows V of what the source holds."""
    return weight.source.multiply(x, weight.rows, not by_columns, product)


class Factors(Source):
    """A weight as the product of `left` `[..., T, r]` and `right` `[..., r, S]`."""

    def __init__(self, left: Tensor, right: Tensor, dense: Callable[[], Tensor]) -> None:
        self.left, self.right, self._dense = left, right, dense

    def dense(self) -> Tensor:
        return self._dense()

    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Tensor:
        left, right = self.left, self.right
        for index in rows:
            left, right = left[index], right[index] if right.dim() > 2 else right
        return product(product(x, left.mT), right.mT) if transposed else product(product(x, right), left)


class Made(Source):
    """A weight that is made as a whole, or a module, without a bias, that multiplies by it."""

    def __init__(self, dense: Callable[[], Tensor], layer: Callable[[Tensor], Tensor] | None = None) -> None:
        self._dense, self._layer = dense, layer

    def dense(self) -> Tensor:
        return self._dense()

    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Any:
        return None if self._layer is None or rows or transposed else self._layer(x)


def weight_of_factors(factor: Tensor, shape: tuple[int, ...], source: Source) -> Tensor:
    """The weight of a layer that holds factors, of which `factor` is one; compiled and traced code gets it at once."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return source.dense()
    return LazyWeight.of(_like(factor, shape), source)
