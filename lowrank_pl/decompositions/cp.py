"""CP: a kernel as a sum of rank-one terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from lowrank_pl.checks import check_int
from lowrank_pl.decompositions.base import Analysis, Decomposition, Stagewise
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator
from lowrank_pl.linalg import Root, Terms, cp_als, expand
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Chain, Rank, Structure

SWEEPS = 20  # of least squares, for the errors that rank rules see


@final
@dataclass(frozen=True)
class CP(Decomposition):
    """`1 x 1` to R channels, `d x 1` and `1 x d` within each of them, `1 x 1` to T: Lebedev et al. (ICLR 2015).

    `K[t, s, y, x] = sum_r a_tr b_sr c_yr d_xr` by alternating least squares, from the largest terms of the higher-order
    SVD and from `restarts` random starts; terms that would cancel each other are held down. One depthwise convolution
    for each axis of the kernel that is longer than 1. For ungrouped convolutions, transposed ones too.

    The rank is one number. It is full where the terms are exact by construction: at the product of T, S and the
    kernel's sizes without the largest of them, 576 for 64 x 64 x 3 x 3; the factors have fewer weights than the layer
    up to half of that, so that `CompressionRatio` says more than `RankFraction` does. Spectra do not nest, and are none
    of matrices, which `EVBMF` is for. For rules that look at errors these are measured when they ask, at the ranks 1,
    2, 4, 8, ..., and interpolated; after fewer iterations than a projection takes, which leaves a few percent too much
    of the norm at a quarter of the weights, and more (a fifth, a third) where there are nearly as many as in the layer.

    A projection takes up to 100 sweeps of `4 T S d d R` multiply-adds: tenths of a second for 64 channels, minutes for
    512. One of a projection is no exact copy of it where there are many terms.
    """

    restarts: int = 0

    def __post_init__(self) -> None:
        check_int("restarts", self.restarts, 0)

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None if layer.kernel and layer.groups == 1 else "needs an ungrouped convolution"

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (layer.num_weights // max(layer.operator_shape),)

    def layout(self, layer: LayerSpec, rank: Rank) -> Chain:
        flat = [i for i, size in enumerate(layer.kernel) if size == 1]
        links = [layer.along(*flat).with_(out_channels=rank[0])]  # strides and padding where no other link has them
        if not flat:
            links[0] = links[0].with_(kind="conv", padding=(0,) * len(layer.kernel), padding_mode="zeros")
        for i in _long(layer):
            within = {"in_channels": rank[0], "out_channels": rank[0], "groups": rank[0]}
            links.append(layer.along(i).with_(**within, inputs=links[-1].outputs))
        return Chain(layer, (*links, links[-1].then(layer.out_channels)))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        sizes = (layer.out_channels, layer.in_channels, *(layer.kernel[i] for i in _long(layer)))
        kernel = as_operator(weight, layer).reshape(sizes)
        if metric is None:
            return Polyadic(self, layer, kernel, expand(kernel), (None,) * len(sizes))
        marginals = metric.rows(), metric.columns(), *(metric.places(i) for i in _long(layer))
        roots = [None if root is None else root.square.squeeze(0).to(kernel.device) for root in marginals]
        white = kernel.double()
        for mode, root in enumerate(roots):
            white = white if root is None else root.times(white.movedim(mode, -1)).movedim(-1, mode)
        white = white.to(kernel.dtype)
        return Stagewise(self, layer, weight, metric, Polyadic(self, layer, white, expand(white), roots))


@final
@dataclass(frozen=True, eq=False)
class Polyadic(Analysis):
    """A kernel `[T, S, *sizes above 1]` with the orthogonal terms that make it up, where the iterations start. With
    `roots` it is one that has been multiplied by these in each mode, which the factors undo."""

    decomposition: CP
    layer: LayerSpec
    kernel: Tensor
    terms: Terms
    roots: Sequence[Root | None]

    @cached_property
    def errors(self) -> tuple[Tensor, ...]:
        tails = self.terms.tails
        full = len(tails) - 1
        cheaper = max(self.layer.num_weights // self.decomposition.layout(self.layer, (1,)).num_weights, 1)
        grid = {*(2**i for i in range(cheaper.bit_length())), cheaper}
        ranks = sorted(r for r in grid if r < full)
        measured = [cp_als(self.kernel, self.terms, r, sweeps=SWEEPS)[1] for r in ranks]
        known = np.interp(np.arange(full + 1), [0, *ranks, full], [float(tails[0]), *measured, 0.0])
        return (torch.from_numpy(known).to(tails).minimum(tails).cummin(0).values,)

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        factors = list(cp_als(self.kernel, self.terms, rank[0], self.decomposition.restarts)[0].factors)
        for mode, root in enumerate(self.roots):
            if root is not None:
                factors[mode] = root.solve(factors[mode].mT).mT
        outer, *others = Terms(tuple(factors)).balanced().factors
        layout = self.decomposition.layout(self.layer, rank)
        shaped = zip((*(factor.mT for factor in others), outer), layout.shapes(), strict=True)
        return Structure(layout, rank, tuple(x.reshape(shape).to(self.kernel.dtype) for x, shape in shaped))


def _long(layer: LayerSpec) -> list[int]:
    """The axes of its kernel that are longer than 1."""
    return [i for i, size in enumerate(layer.kernel) if size > 1]
