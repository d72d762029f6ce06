"""Tucker-2: low rank in the input and the output channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.decompositions.base import Decomposition
from lowrank_pl.decompositions.spatial_svd import only_ungrouped_conv2d
from lowrank_pl.decompositions.structure import Chain, Rank
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import tail_energies, tucker2, unfold


@final
@dataclass(frozen=True)
class Tucker2(Decomposition):
    """`1 x 1` to r_in channels, `d x d` to r_out, `1 x 1` to T: Kim et al. (ICLR 2016); Lee et al. (2019), eq. 3.

    The rank is (r_in, r_out). For ungrouped two-dimensional convolutions.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return only_ungrouped_conv2d(layer)

    def full_rank(self, layer: LayerSpec) -> Rank:
        area = layer.kernel[0] * layer.kernel[1]
        rows, columns = layer.out_channels, layer.in_channels
        return min(columns, rows * area), min(rows, columns * area)

    def stages(self, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        ones, zeros = (1, 1), (0, 0)
        inner = layer.with_(
            out_channels=rank[0], kernel=ones, stride=ones, padding=zeros, dilation=ones, padding_mode="zeros"
        )
        core = layer.with_(in_channels=rank[0], out_channels=rank[1], inputs=inner.outputs)
        return inner, core, core.then(layer.out_channels)

    def spectra(self, weight: Tensor, layer: LayerSpec) -> tuple[Tensor, ...]:
        kernel = weight.flatten(2)
        return tail_energies(unfold(kernel, 1)), tail_energies(unfold(kernel, 0))

    def _factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Chain:
        factors = tucker2(weight.flatten(2), *rank)
        outer, core, inner = (x.to(weight.dtype) for x in factors)
        stages = self.stages(layer, rank)
        operators = tuple(
            x.reshape(stage.operator_shape) for x, stage in zip((inner, core, outer), stages, strict=True)
        )
        return Chain(layer, rank, stages, operators)
