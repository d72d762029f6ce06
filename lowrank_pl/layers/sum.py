"""Layers side by side, whose outputs are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.layers.lazy_weight import LazyWeight, Source, WeightLayout, weight_of_factors


@final
class SumLayer(nn.Module):
    """Branches in place of a layer, which has the `weight` and `bias` that the layer had, for code that asks.

    `layout` knows how the branches' tensors make the weight; the first branch has the bias.
    """

    __jit_unused_properties__ = ("bias", "weight")  # for torch.jit.script

    def __init__(self, branches: list[nn.Module], layout: WeightLayout) -> None:
        super().__init__()
        self.branches, self.layout = nn.ModuleList(branches), layout

    @property
    def weight(self) -> Tensor:
        """The sum of the branches' weights, as the layer stored it."""
        weights: list[Any] = [branch.weight for branch in self.branches]
        source = _Added(weights, lambda: self.layout.weight(self.layout.tensors(self)))
        return weight_of_factors(weights[0], self.layout.layer.stored_shape, source)

    @property
    def bias(self) -> nn.Parameter | None:
        bias = self.branches[0].bias
        assert isinstance(bias, nn.Parameter | None)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


class _Added(Source):
    """Weights that are multiplied by one after another."""

    def __init__(self, weights: Sequence[Tensor], dense: Callable[[], Tensor]) -> None:
        self.weights, self._dense = weights, dense

    def dense(self) -> Tensor:
        return self._dense()

    def multiply(self, x: Tensor, rows: tuple[Any, ...], transposed: bool, product: Callable[..., Tensor]) -> Any:
        products = []
        for weight in self.weights:
            if isinstance(weight, LazyWeight):
                products.append(weight.source.multiply(x, rows, transposed, product))
                continue
            for index in rows:
                weight = weight[index]
            products.append(product(x, weight.mT if transposed else weight))
        return None if any(y is None for y in products) else sum(products)
