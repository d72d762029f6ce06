"""What will be deployed in place of one linear map: its layout in integers, and the numbers that fill it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import product_dtype
from lowrank_pl.metric import Metric

Rank = tuple[int, ...]


class Layout(ABC):
    """What will be deployed in place of `layer`, in integers: everything but the numbers follows from it.

    Final subclasses are frozen dataclasses, one file each; nothing else asks which of them a structure is of.
    """

    layer: LayerSpec

    @property
    @abstractmethod
    def stages(self) -> tuple[LayerSpec, ...]:
        """The linear maps that its factors are, in the order of running: what costs are charged for."""

    @property
    @abstractmethod
    def macs(self) -> int | None:
        """Multiply-adds for one input of the network, as it will run; None while the layer has not been seen to."""

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensors: weights, and integers that say where weights stand."""

    @property
    def num_weights(self) -> int:
        """Stored weights, the bias apart."""
        return sum(math.prod(shape) for shape in self.shapes())

    @property
    def index_bytes(self) -> int:
        """Bytes of what says where weights stand; mostly nothing."""
        return 0

    @abstractmethod
    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        """The dense weight that the tensors make, as PyTorch stores it, in their own type."""

    def forms(self) -> tuple[Layout, ...]:
        """The ways in which the module can compute, of which a measurement may choose; the first one without."""
        return (self,)

    @abstractmethod
    def build(self, bias: bool) -> nn.Module:
        """An empty module, to be filled by `parameters`."""

    @abstractmethod
    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """What the module's parameters hold, by name, and its buffers, where tensors are integers."""

    @abstractmethod
    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The inverse of `parameters`: its tensors from a module of this layout, for autograd to follow."""

    @abstractmethod
    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """The same with the last factors such that the weight is nearest to `target`, given the others. float64."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for a table, such as `3x3 16 > 1x1 64`."""

    @property
    def note(self) -> str:
        """What a user should know about how it runs; mostly nothing."""
        return ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; `layout_from_dict` is the inverse."""


@final
@dataclass(frozen=True, eq=False)
class Structure:
    """A weight written as something cheaper: a layout, and the numbers in it.

    `rank` is that of the decomposition that made it. `bias` takes the place of the layer's own, where that has to move
    with the weight; None leaves it.
    """

    layout: Layout
    rank: Rank
    tensors: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    def num_weights(self) -> int:
        """Stored weights, the bias apart."""
        return self.layout.num_weights

    @property
    def macs(self) -> int | None:
        """Multiply-adds for one input of the network; None while the layer has not been seen to run."""
        return self.layout.macs

    @torch.no_grad()
    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, as PyTorch stores it; in `dtype`, or in the tensors' own type."""
        dtype = dtype or self.tensors[0].dtype
        wide = product_dtype(dtype, self.tensors[0].device)
        return self.layout.weight(in_type(self.tensors, wide)).to(dtype)

    def to_module(self, bias: Tensor | None) -> nn.Module:
        """The layer to deploy, on the tensors' device and in their type; `bias` is that of the layer it replaces."""
        bias = bias if self.bias is None else self.bias
        with torch.device("meta"):
            module = self.layout.build(bias is not None)
        for name, value in self.layout.parameters(self.tensors, bias).items():
            parent, _, leaf = name.rpartition(".")
            own = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(module.get_submodule(parent), leaf, nn.Parameter(own) if own.is_floating_point() else own)
        return module

    def with_layout(self, layout: Layout) -> Structure:
        """The same numbers in another form of the layout."""
        return replace(self, layout=layout)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Structure:
        """The same layout with other numbers."""
        return replace(self, tensors=tuple(tensors))


def in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights in another type; integers, which say where they stand, as they are."""
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


def total_macs(stages: Sequence[LayerSpec]) -> int | None:
    """Multiply-adds of all stages for one input of the network; None while none has been seen."""
    macs = [stage.macs for stage in stages]
    return None if None in macs else sum(n for n in macs if n is not None)
