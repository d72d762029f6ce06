"""Spatial SVD: a column filter, then a row filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator
from lowrank_pl.linalg import decompose
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Layout, Rank


@final
@dataclass(frozen=True)
class SpatialSVD(Decomposition):
    """A `d x 1` convolution to r channels, then a `1 x d` one: the matrix `(T d) x (S d)` at rank r.

    "Scheme 2" of Idelbayev & Carreira-Perpinan (CVPR 2020), after Jaderberg et al. (BMVC 2014) and Tai et al. (ICLR
    2016). The rank is one number, per group for grouped convolutions. For two-dimensional convolutions, depthwise and
    transposed ones too.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None if len(layer.kernel) == 2 else "needs a two-dimensional convolution"

    def full_rank(self, layer: LayerSpec) -> Rank:
        height, width = layer.kernel
        return (min(layer.out_channels * width, layer.in_channels * height) // layer.groups,)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        columns = layer.along(0).with_(out_channels=rank[0] * layer.groups)
        rows = layer.along(1).with_(in_channels=columns.out_channels, inputs=columns.outputs)
        return Chain(layer, (columns, rows))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        operator = as_operator(weight, layer).unflatten(0, (layer.groups, -1))
        matrices = operator.permute(0, 1, 4, 2, 3).flatten(1, 2).flatten(2)  # [groups, T d, S d]
        if metric is None:
            return Truncation(self, layer, [decompose(matrices)], _arrange)
        system = decompose(matrices, metric.rows(layer.kernel[1]), metric.columns(0))
        return Stagewise(self, layer, weight, metric, Truncation(self, layer, [system], _arrange))


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    ((left, right),) = factors
    columns = right.reshape(layout.shapes()[0])  # [g r, S, d, 1]
    rows = left.unflatten(1, (-1, layer.kernel[1])).transpose(2, 3).flatten(0, 1)
    return [columns, rows.unsqueeze(2)]  # and [T, r, 1, d]
