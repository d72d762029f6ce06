"""Linear layers side by side on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.layers.lazy_weight import LazyWeight, Made, weight_of_factors


class StackedLinear(nn.Module):
    """Its children `0`, `1` and so on, each from `[..., in]` to a part of the outputs, one after another."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, made when its values are needed."""
        weights: list[Any] = [layer.weight for layer in self.children()]
        shape = (sum(len(w) for w in weights), weights[0].shape[1])
        make = lambda: torch.cat([w.make() if isinstance(w, LazyWeight) else w for w in weights])  # noqa: E731
        return weight_of_factors(next(self.parameters(), weights[0]), shape, Made(make))

    @property
    def bias(self) -> Tensor | None:
        biases: list[Any] = [layer.bias for layer in self.children()]
        return None if biases[0] is None else torch.cat(biases)
