"""Block SVD: the lowered matrix cut at whole input channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.checks import check_int
from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator
from lowrank_pl.linalg import decompose
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Layout, Rank


@final
@dataclass(frozen=True)
class BlockSVD(Decomposition):
    """Blocks of c input channels of the matrix `T x (S d d)`, each at rank r.

    Tiled SVD (Lee et al., 2019) cut so that it deploys as ordinary layers: a `d x d` convolution with `S / c` groups
    to r channels each, then a `1 x 1` one. c is the divisor of S nearest to `channels` by ratio. The rank is one
    number. For linear layers (blocks of inputs) and ungrouped convolutions, transposed ones too.
    """

    channels: int = 8

    def __post_init__(self) -> None:
        check_int("channels", self.channels, 1)

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None if layer.groups == 1 else "needs an ungrouped layer"

    def blocks(self, layer: LayerSpec) -> int:
        """How many blocks, `S / c`."""
        divisors = [c for c in range(1, layer.in_channels + 1) if layer.in_channels % c == 0]
        nearest = min(divisors, key=lambda c: max(c / self.channels, self.channels / c))
        return layer.in_channels // nearest

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (min(layer.out_channels, layer.num_weights // layer.out_channels // self.blocks(layer)),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        blocks = self.blocks(layer)
        first = layer.with_(out_channels=rank[0] * blocks, groups=blocks)
        return Chain(layer, (first, first.then(layer.out_channels)))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        count = self.blocks(layer)
        blocks = as_operator(weight, layer).unflatten(1, (count, -1)).transpose(0, 1).flatten(2)  # [blocks, T, c d d]
        if metric is None:
            return Truncation(self, layer, [decompose(blocks)], _arrange)
        inputs = metric.columns(*range(len(layer.kernel)))
        of_blocks = None if inputs is None else inputs.blocks(0, count, blocks.shape[-1]).squeeze(0)
        system = decompose(blocks, metric.rows(), of_blocks)
        return Stagewise(self, layer, weight, metric, Truncation(self, layer, [system], _arrange))


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    ((left, right),) = factors
    first, second = layout.shapes()
    return [right.reshape(first), left.transpose(0, 1).reshape(second)]  # the second [T, blocks r]
