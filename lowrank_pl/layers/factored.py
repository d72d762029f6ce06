"""Factors in place of a parameter, and of an embedding's table."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank_pl.layers.chain import FactorChain
from lowrank_pl.layers.lazy_weight import Factors, LazyWeight, Made, Source, weight_of_factors
from lowrank_pl.layers.some_channels import SomeChannelsLayer
from lowrank_pl.layers.sum import SumLayer


class StandIn(nn.Module, ABC):
    """A module that stands where a module had a Parameter, and is to its code what the parameter was: a tensor."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The parameter, as a `LazyWeight`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For PyTorch this is the tensor."""
        args, kwargs = tree_map_only(StandIn, lambda each: each.tensor(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(self.tensor(), name)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor; modules are moved by their parents, through `_apply`."""
        return self.tensor().to(*args, **kwargs)

    def float(self) -> Any:
        return self.tensor().float()

    def double(self) -> Any:
        return self.tensor().double()

    def half(self) -> Any:
        return self.tensor().half()

    def bfloat16(self) -> Any:
        return self.tensor().bfloat16()

    def type(self, dst_type: Any = None) -> Any:
        return self.tensor().type(dst_type)


def _operator(name: str) -> Any:
    def call(self: StandIn, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return call


for _name in (
    "getitem", "len", "iter", "matmul", "rmatmul", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv",
    "pow", "neg", "abs",
):  # fmt: skip
    setattr(StandIn, f"__{_name}__", _operator(f"__{_name}__"))


@final
class FactoredParameter(StandIn):
    """A tensor of this shape, whose products with others go through the factors and which is made whole only where
    something else wants it.

    `factors` is a `FactorChain` or `RebuildingLayer` of a linear layer, with a group for each matrix of the parameter.
    With `whole` the parameter is another reshaping of their weight, complex ones from pairs of numbers, and is always
    made.
    """

    def __init__(
        self, factors: nn.Module, shape: tuple[int, ...], whole: bool = False, is_complex: bool = False
    ) -> None:
        super().__init__()
        self.factors, self._shape, self._whole, self._complex = factors, shape, whole, is_complex

    def tensor(self) -> Tensor:
        factors: Any = self.factors
        like = next(factors.parameters(), torch.empty(0))

        def make() -> Tensor:
            weight = factors.weight
            dense: Tensor = weight.make() if isinstance(weight, LazyWeight) else weight
            dense = dense.reshape(*self._shape, 2) if self._complex else dense.reshape(self._shape)
            dense = dense.contiguous()  # the zeros of rank 0 have no memory of their own
            return torch.view_as_complex(dense) if self._complex else dense

        like = torch.view_as_complex(like.new_empty(2)) if self._complex else like
        if self._whole or not isinstance(factors, FactorChain) or not factors.is_pair:
            return weight_of_factors(like, self._shape, Made(make))
        links: Any = factors
        right, left = (link.weight for link in links)
        right = right.reshape(*self._shape[:-2], -1, self._shape[-1])
        left = left.reshape(*self._shape[:-1], -1)
        return weight_of_factors(like, self._shape, Factors(left, right, make))

    def extra_repr(self) -> str:
        return f"shape={self._shape}"


@final
class FactoredExperts(StandIn):
    """A tensor `[experts, T, S]` of linear layers without a bias, its children `0`, `1` and so on, each with a rank of
    its own. Products with a single one go through its factors, others need the whole."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._modules.update({str(i): layer for i, layer in enumerate(layers)})

    def tensor(self) -> Tensor:
        weights: list[Any] = [layer.weight for layer in self.children()]
        shape = (len(weights), *weights[0].shape)
        return weight_of_factors(next(self.parameters(), weights[0]), shape, _Stacked(weights))


class _Stacked(Source):
    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights

    def dense(self) -> Tensor:
        return torch.stack([w.make() if isinstance(w, LazyWeight) else w for w in self.weights])

    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Any:
        if not rows or isinstance(rows[0], slice) or (isinstance(rows[0], Tensor) and rows[0].dim()):
            return None
        weight, others = self.weights[int(rows[0])], rows[1:]
        if isinstance(weight, LazyWeight):
            found = weight.source.multiply(x, others, transposed, product)
            if found is not None:
                return found
            weight = weight.make()
        for index in others:
            weight = weight[index]
        return product(x, weight.mT if transposed else weight)


class FactoredEmbedding(nn.Module):
    """An embedding `[V, H]` whose table is the weight of `factors`, a linear layer from H to V without a bias: a row of
    the one factor times the other. The layer itself may be the head of the same network, which is tied to it."""

    def __init__(self, factors: nn.Module, padding_idx: int | None) -> None:
        super().__init__()
        self.factors, self.padding_idx = factors, padding_idx

    @property
    def weight(self) -> Tensor:
        """The table."""
        weight = self.factors.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        links: Any = self.factors
        if isinstance(self.factors, FactorChain) and all(isinstance(link, nn.Linear) for link in links):
            last, *others = (link.weight for link in reversed(links))
            rows: Tensor = F.embedding(input, last, self.padding_idx)
            for factor in others:
                rows = rows @ factor
            return rows
        return F.embedding(input, self.weight, self.padding_idx)


def tied(layer: nn.Module, bias: Tensor | None) -> nn.Module:
    """Another layer on the same parameters, but for its bias."""
    other = copy.copy(layer)
    if isinstance(other, FactorChain):
        other._modules = {**other._modules}
        last = next(reversed(other._modules))
        other._modules[last] = tied(other[-1], bias)
    elif isinstance(other, SomeChannelsLayer):
        other._modules = {**other._modules, "inner": tied(other.inner, bias)}
    elif isinstance(other, SumLayer):
        first, *others = other.branches
        other._modules = {**other._modules, "branches": nn.ModuleList([tied(first, bias), *others])}
    elif bias is not None:
        vars(other).pop("bias", None)  # a layer without one may say so as a plain attribute
        other._parameters = {**other._parameters, "bias": nn.Parameter(bias.detach().clone())}
    return other
