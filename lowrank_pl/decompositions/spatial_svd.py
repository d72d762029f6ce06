"""Spatial SVD: a column filter, then a row filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.structure import Chain, Rank
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import tail_energies, truncated_svd


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

    def stages(self, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        def axis(i: int) -> dict[str, Any]:
            along = {name: _keep(getattr(layer, name), i, 1) for name in ("kernel", "stride", "dilation")}
            padding = "same" if layer.padding == "same" else _keep(layer.padding, i, 0)
            return {**along, "padding": padding}

        columns = layer.with_(out_channels=rank[0], **axis(0))
        return columns, columns.then(layer.out_channels, padding_mode=layer.padding_mode, **axis(1))

    def spectra(self, weight: Tensor, layer: LayerSpec) -> tuple[Tensor, ...]:
        return (tail_energies(self._matrix(weight)),)

    def _factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Chain:
        left, right = (x.to(weight.dtype) for x in truncated_svd(self._matrix(weight), rank[0]))
        stages = self.stages(layer, rank)
        columns = right.reshape(stages[0].operator_shape)  # [r, S, d, 1]
        rows = left.unflatten(0, (layer.out_channels, -1)).transpose(1, 2).unsqueeze(2)  # [T, r, 1, d]
        return Chain(layer, rank, stages, (columns, rows))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)


def only_ungrouped_conv2d(layer: LayerSpec) -> str | None:
    """The reason that several decompositions give."""
    if layer.kind == "conv" and len(layer.kernel) == 2 and layer.groups == 1:
        return None
    return "needs an ungrouped Conv2d"


def _keep(sizes: Any, i: int, other: int) -> tuple[int, int]:
    """`sizes` along axis i, `other` along the other axis."""
    return (sizes[0], other) if i == 0 else (other, sizes[1])
