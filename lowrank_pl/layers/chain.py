"""Ordinary layers one after another, in place of one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.lazy_weight import Factors, Made, Source, weight_of_factors


class _Layout(Protocol):
    @property
    def layer(self) -> LayerSpec: ...

    @property
    def stages(self) -> tuple[LayerSpec, ...]: ...

    def weight(self, tensors: tuple[Tensor, ...]) -> Tensor: ...

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]: ...


class FactorChain(nn.Sequential):
    """The factors of a layer as layers, which has the `weight` and `bias` that the layer had, for code that asks.

    `layout` knows how the factors make the weight.
    """

    __jit_unused_properties__ = ("bias", "is_pair", "weight")  # for torch.jit.script

    def __init__(self, links: list[nn.Module], layout: _Layout) -> None:
        super().__init__(*links)
        self.layout = layout

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
