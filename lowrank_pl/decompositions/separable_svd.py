"""Separable SVD: output PCA, then spatial SVD of what is left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch.nn.functional as F
from torch import Tensor

from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise
from lowrank_pl.decompositions.spatial_svd import SpatialSVD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator, as_stored
from lowrank_pl.linalg import left_system, tail_energies
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Rank, Structure


@final
@dataclass(frozen=True)
class SeparableSVD(Decomposition):
    """`d x 1` to r_1 channels, `1 x d` to r_2, `1 x 1` to T: Zhang et al. (TPAMI 2016), 3.4; Jaderberg et al. (BMVC
    2014), scheme 2, behind a `1 x 1`.

    First the leading r_2 left singular vectors of the matrix `T x (S d d)`, then spatial SVD of the kernel in their
    coordinates, `(r_2 d) x (S d)` at rank r_1, whose singular values are no larger than those of the whole kernel. The
    rank is (r_1, r_2). For ungrouped two-dimensional convolutions, transposed ones too.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        fits = len(layer.kernel) == 2 and layer.groups == 1
        return None if fits else "needs an ungrouped two-dimensional convolution"

    def full_rank(self, layer: LayerSpec) -> Rank:
        return *SpatialSVD().full_rank(layer), min(layer.out_channels, layer.num_weights // layer.out_channels)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        columns, rows = SpatialSVD().layout(layer.with_(out_channels=rank[1]), rank[:1]).links
        return Chain(layer, (columns, rows, rows.then(layer.out_channels)))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        matrix = as_operator(weight, layer).flatten(1)
        white = matrix if metric is None else _whitened(matrix, layer, metric)
        found = Separated(self, layer, weight, left_system(white), metric)
        return found if metric is None else Stagewise(self, layer, weight, metric, found)


@final
@dataclass(frozen=True, eq=False)
class Separated(Analysis):
    """A weight with the squared singular values and left vectors of its matrix `T x (S d d)`, as seen in the metric."""

    decomposition: SeparableSVD
    layer: LayerSpec
    weight: Tensor
    outer: tuple[Tensor, Tensor]
    metric: Metric | None = None

    @property
    def errors(self) -> tuple[Tensor, ...]:
        return *self._spatial.errors, tail_energies(self.outer[0])

    @cached_property
    def _spatial(self) -> Analysis:
        return SpatialSVD().analyze(self.weight, self.layer, self.metric)

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        layout, narrow = self.decomposition.layout(self.layer, rank), self.layer.with_(out_channels=rank[1])
        inner, outer = self._coordinates(rank[1])
        # of more than all ranks that the narrow kernel has the rest are zeros
        r = min(rank[0], *SpatialSVD().full_rank(narrow))
        metric = None if self.metric is None else Metric(narrow, self.metric.inputs)
        columns, rows = SpatialSVD().factor(as_stored(inner, narrow), narrow, (r,), metric).tensors
        tensors = F.pad(columns, (0,) * 7 + (rank[0] - r,)), F.pad(rows, (0,) * 5 + (rank[0] - r,)), outer
        shaped = (x.reshape(shape) for x, shape in zip(tensors, layout.shapes(), strict=True))
        return Structure(layout, rank, tuple(x.to(self.weight.dtype) for x in shaped))

    def _coordinates(self, count: int) -> tuple[Tensor, Tensor]:
        """The narrow kernel `[r_2, S, d, d]`, whose outputs weigh alike, and `[T, r_2]` from it to the outputs."""
        kernel, basis = as_operator(self.weight, self.layer).double(), self.outer[1][:, :count]
        outputs = None if self.metric is None or self.metric.outputs is None else self.metric.outputs.square.squeeze(0)
        outer = basis
        if outputs is not None:
            root = outputs.to(kernel.device)
            kernel = root.times(kernel.movedim(0, -1)).movedim(-1, 0)
            outer = root.solve(basis.mT).mT
        inner = (basis.mT @ kernel.flatten(1)).unflatten(1, kernel.shape[1:])
        # of float32 weights it has no more digits, and the fast route of the SVD is exact enough
        return inner if self.weight.dtype == inner.dtype else inner.float(), outer


def _whitened(matrix: Tensor, layer: LayerSpec, metric: Metric) -> Tensor:
    """`B^(1/2) W A^(1/2)` as `[T, k]`."""
    white = metric.whiten(matrix.double().unflatten(1, (-1, *layer.kernel)).unsqueeze(0))
    white = white if metric.outputs is None else metric.outputs.square.to(white.device).times(white.mT).mT
    return white.squeeze(0).to(matrix.dtype)
