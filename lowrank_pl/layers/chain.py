"""Ordinary layers one after another, in place of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.lazy_weight import Factors, Made, Source, weight_of_factors
from lowrank_pl.layers.ordinary import as_stored

Between = Literal["norms", "biases"]
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _Layout(Protocol):
    @property
    def layer(self) -> LayerSpec: ...

    @property
    def stages(self) -> tuple[LayerSpec, ...]: ...

    @property
    def between(self) -> Between | None: ...

    def weight(self, tensors: tuple[Tensor, ...]) -> Tensor: ...

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]: ...

    def with_between(self, between: Between | None) -> _Layout: ...


class FactorChain(nn.Sequential):
    """The factors of a layer as layers, which has the `weight` and `bias` that the layer had, for code that asks.

    `layout` knows how the factors make the weight. Between links, which are `0`, `1` and so on, stand batch norms,
    `norm0` and so on, where it says so.
    """

    __jit_unused_properties__ = ("bias", "is_pair", "norms", "weight")  # for torch.jit.script

    def __init__(self, links: list[nn.Module], layout: _Layout) -> None:
        super().__init__(*links)
        self.layout = layout
        if layout.between == "norms":
            self.insert_norms_()

    def insert_norms_(self) -> None:
        """Put a fresh batch norm behind every link but the last: Tai et al. (ICLR 2016), for training from scratch."""
        *inner, last = [self.get_submodule(str(i)) for i in range(len(self.layout.stages))]
        norms = [_NORMS[len(self.layout.layer.kernel)](stage.out_channels) for stage in self.layout.stages[:-1]]
        self._modules.clear()
        for i, (link, norm) in enumerate(zip(inner, norms, strict=True)):
            weight = next(link.parameters())
            self.add_module(str(i), link)
            norm = norm.to(weight.device, weight.dtype).train(self.training).requires_grad_(weight.requires_grad)
            self.add_module(f"norm{i}", norm)
        self.add_module(str(len(inner)), last)
        self.layout = self.layout.with_between("norms")

    @torch.no_grad()
    def fold_norms_(self) -> None:
        """Turn batch norms into scales and biases of the links before them, which is what they are in evaluation mode,
        whatever the padding: that of the next link comes after the bias, as it came after the norm."""
        operators, stages = self.layout.tensors(self), self.layout.stages  # with the scales
        for i, norm in enumerate(self.norms):
            link: Any = self.get_submodule(str(i))
            learns = link.weight.requires_grad
            link.weight.copy_(as_stored(operators[i], stages[i]))
            link.bias = nn.Parameter(norm.bias - norm.running_mean * scale_of(norm), requires_grad=learns)
            del self._modules[f"norm{i}"]
        self.layout = self.layout.with_between("biases")

    @property
    def norms(self) -> Sequence[Any]:
        """Those between the links, in their order."""
        return [module for name, module in self.named_children() if name.startswith("norm")]

    @property
    def weight(self) -> Tensor:
        """The product of the factors, as the layer stored it."""
        factor = self[0].weight
        assert isinstance(factor, Tensor)
        shape = self.layout.layer.stored_shape
        source: Source = Made(lambda: self.layout.weight(self.layout.tensors(self)))
        if self.is_pair and self.layout.layer.groups == 1:
            source = Factors(self[1].weight, self[0].weight, source.dense)  # type: ignore[arg-type]
        return weight_of_factors(factor, shape, source)

    @property
    def is_pair(self) -> bool:
        """Whether the weight is the product of two matrices, or, in groups, of as many pairs of them."""
        layer, stages = self.layout.layer, self.layout.stages
        return layer.kind == "linear" and len(stages) == 2 and {stage.groups for stage in stages} == {layer.groups}

    @property
    def bias(self) -> nn.Parameter | None:
        bias = self[-1].bias
        assert isinstance(bias, nn.Parameter | None)
        return bias


def scale_of(norm: Any) -> Tensor:
    """What a batch norm in evaluation mode multiplies each channel by."""
    scale: Tensor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale
