"""SVD of the lowered kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.decompositions.base import Decomposition, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator
from lowrank_pl.linalg import Root, decompose
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Layout, Rank


@final
@dataclass(frozen=True)
class SVD(Decomposition):
    """A `d x d` convolution to r channels, then a `1 x 1` one: the lowered matrix `T x (S d d)` at rank r.

    "Scheme 1" of Idelbayev & Carreira-Perpinan (CVPR 2020), "SVD" of Lee et al. (2019). Two linear layers for a
    linear layer; r per group for grouped convolutions. A transposed convolution is the adjoint of a convolution, and
    so is its structure: `1 x 1` first, then `d x d`, from the matrix `S x (T d d)`, which keeps the cheap stage on the
    small image. The rank is one number.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None

    def full_rank(self, layer: LayerSpec) -> Rank:
        rows, columns = self._matrix_shape(layer)
        return (min(rows, columns),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        channels = rank[0] * layer.groups
        if layer.kind != "conv_transpose":
            first = layer.with_(out_channels=channels)
            return Chain(layer, (first, first.then(layer.out_channels, groups=layer.groups)))
        ones, zeros = (1,) * len(layer.kernel), (0,) * len(layer.kernel)
        first = layer.with_(
            kind="conv", out_channels=channels, kernel=ones, stride=ones, padding=zeros, dilation=ones,
            output_padding=zeros,
        )  # fmt: skip
        return Chain(layer, (first, layer.with_(in_channels=channels, inputs=first.outputs)))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Truncation:
        sides: tuple[Root | None, Root | None] = (None, None)
        if metric is not None and layer.kind == "conv_transpose":
            sides = (metric.columns(), metric.rows(math.prod(layer.kernel)))
        elif metric is not None:
            sides = (metric.rows(), metric.columns(*range(len(layer.kernel))))
        return Truncation(self, layer, [decompose(self._matrices(weight, layer), *sides)], _arrange)

    def _matrix_shape(self, layer: LayerSpec) -> tuple[int, int]:
        rows = layer.in_channels if layer.kind == "conv_transpose" else layer.out_channels
        return rows // layer.groups, layer.num_weights // rows

    def _matrices(self, weight: Tensor, layer: LayerSpec) -> Tensor:
        """`[groups, rows, columns]`."""
        operator = as_operator(weight, layer).unflatten(0, (layer.groups, -1))
        if layer.kind == "conv_transpose":
            operator = operator.transpose(1, 2)
        matrices: Tensor = operator.flatten(2)
        return matrices


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    ((left, right),) = factors
    first, second = layout.shapes()
    if layer.kind != "conv_transpose":
        return [right.reshape(first), left.reshape(second)]
    per_output = right.unflatten(2, (layer.out_channels // layer.groups, -1)).transpose(1, 2)
    return [left.mT.reshape(first), per_output.reshape(second)]
