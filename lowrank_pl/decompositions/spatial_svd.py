"""Spatial SVD: a column filter, then a row filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lowrank_pl.decompositions.base import Decomposition, Truncation
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import decompose
from lowrank_pl.structures import Chain, Layout, Rank


@final
@dataclass(frozen=True)
class SpatialSVD(Decomposition):
    """A `d x 1` convolution to r channels, then a `1 x d` one: the matrix `(T d) x (S d)` at rank r.

    "Scheme 2" of Idelbayev & Carreira-Perpinan (CVPR 2020), after Jaderberg et al. (BMVC 2014) and Tai et al. (ICLR
    2016). The rank is one number. For ungrouped two-dimensional convolutions.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return only_ungrouped_conv2d(layer)

    def full_rank(self, layer: LayerSpec) -> Rank:
        height, width = layer.kernel
        return (min(layer.out_channels * width, layer.in_channels * height),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        def axis(i: int) -> dict[str, Any]:
            along = {name: _keep(getattr(layer, name), i, 1) for name in ("kernel", "stride", "dilation")}
            padding = "same" if layer.padding == "same" else _keep(layer.padding, i, 0)
            return {**along, "padding": padding}

        columns = layer.with_(out_channels=rank[0], **axis(0))
        return Chain(layer, (columns, columns.then(layer.out_channels, padding_mode=layer.padding_mode, **axis(1))))

    def analyze(self, weight: Tensor, layer: LayerSpec) -> Truncation:
        matrix = weight.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)  # (T d) x (S d)
        return Truncation(self, layer, [decompose(matrix)], _arrange)


def _arrange(layer: LayerSpec, layout: Layout, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    ((left, right),) = factors
    columns = right.reshape(layout.shapes()[0])  # [r, S, d, 1]
    return [columns, left.unflatten(0, (layer.out_channels, -1)).transpose(1, 2).unsqueeze(2)]  # and [T, r, 1, d]


def only_ungrouped_conv2d(layer: LayerSpec) -> str | None:
    """The reason that several decompositions give."""
    if layer.kind == "conv" and len(layer.kernel) == 2 and layer.groups == 1:
        return None
    return "needs an ungrouped Conv2d"


def _keep(sizes: Any, i: int, other: int) -> tuple[int, int]:
    """`sizes` along axis i, `other` along the other axis."""
    return (sizes[0], other) if i == 0 else (other, sizes[1])
