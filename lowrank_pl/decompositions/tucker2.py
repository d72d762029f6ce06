"""Tucker-2: low rank in the input and the output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator
from lowrank_pl.linalg import Root, left_system, tail_energies, tucker2, unfold
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Rank, Structure


@final
@dataclass(frozen=True)
class Tucker2(Decomposition):
    """`1 x 1` to r_in channels, `d x d` to r_out, `1 x 1` to T: Kim et al. (ICLR 2016); Lee et al. (2019), eq. 3.

    The rank is (r_in, r_out). For ungrouped convolutions, transposed ones too; a linear layer would be three factors
    where two, `SVD`, do the same.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None if layer.kernel and layer.groups == 1 else "needs an ungrouped convolution"

    def full_rank(self, layer: LayerSpec) -> Rank:
        area = math.prod(layer.kernel)
        rows, columns = layer.out_channels, layer.in_channels
        return min(columns, rows * area), min(rows, columns * area)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        ones, zeros = (1,) * len(layer.kernel), (0,) * len(layer.kernel)
        inner = layer.with_(
            kind="conv", out_channels=rank[0], kernel=ones, stride=ones, padding=zeros, dilation=ones,
            output_padding=zeros, padding_mode="zeros",
        )  # fmt: skip
        core = layer.with_(in_channels=rank[0], out_channels=rank[1], inputs=inner.outputs)
        return Chain(layer, (inner, core, core.then(layer.out_channels)))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        kernel = as_operator(weight, layer).flatten(2)
        inputs, outputs = (None, None) if metric is None else (_alone(metric.columns()), _alone(metric.rows()))
        white = kernel
        if inputs is not None:
            white = inputs.to(kernel.device).times(white.double().mT).mT
        if outputs is not None:
            white = outputs.to(kernel.device).times(white.double().transpose(0, 2)).transpose(0, 2)
        white = white.to(kernel.dtype)
        systems = left_system(unfold(white, 1)), left_system(unfold(white, 0))
        found = HigherOrderSVD(self, layer, white, *systems, inputs, outputs)
        return found if metric is None else Stagewise(self, layer, weight, metric, found)


@final
@dataclass(frozen=True, eq=False)
class HigherOrderSVD(Analysis):
    """A kernel `[T, S, K]` with the squared singular values and left vectors of its unfoldings along S and T: what
    Tucker-2 loses (at most), and where its iterations start. With `inputs` `[S, S]` and `outputs` `[T, T]` it is one
    that has been multiplied by these roots, which the outer factors undo."""

    decomposition: Tucker2
    layer: LayerSpec
    kernel: Tensor
    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]
    inputs: Root | None = None
    outputs: Root | None = None

    @property
    def errors(self) -> tuple[Tensor, ...]:
        return tail_energies(self.inner[0]), tail_energies(self.outer[0])

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        starts = self.inner[1][:, : rank[0]], self.outer[1][:, : rank[1]]
        outer, core, inner = tucker2(self.kernel, *starts)
        outer = outer if self.outputs is None else self.outputs.to(outer.device).solve(outer.mT).mT
        inner = inner if self.inputs is None else self.inputs.to(inner.device).solve(inner)
        outer, core, inner = (x.to(self.kernel.dtype) for x in (outer, core, inner))
        layout = self.decomposition.layout(self.layer, rank)
        shaped = (x.reshape(shape) for x, shape in zip((inner, core, outer), layout.shapes(), strict=True))
        return Structure(layout, rank, tuple(shaped))


def _alone(root: Root | None) -> Root | None:
    """That of the only group."""
    return None if root is None else root.square.squeeze(0)
