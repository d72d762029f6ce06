"""Tucker-2 of convolution kernels by higher-order orthogonal iteration (HOOI)."""

import torch
from torch import Tensor

from lowrank_pl.linalg.svd import leading_vectors


def tucker2(
    kernel: Tensor, inner: Tensor, outer: Tensor, iterations: int = 10, tolerance: float = 1e-7
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel[t, s, k] ~ sum over a, b of outer[t, b] core[b, a, k] inner[a, s]`.

    Shapes: kernel `[T, S, K]` to outer `[T, rank_out]`, core `[rank_out, rank_in, K]`, inner `[rank_in, S]`, float64,
    outer and inner orthonormal. Starts from `inner` `[S, rank_in]` and `outer` `[T, rank_out]`, the leading singular
    vectors of both unfoldings (the truncated higher-order SVD), and alternates until the kept share of the energy
    grows by less than `tolerance` (De Lathauwer et al., 2000; Kim et al., ICLR 2016).
    """
    rank_in, rank_out = inner.shape[1], outer.shape[1]
    exact = kernel.double()
    energy = float(exact.square().sum())
    core = _project(_project(exact, 0, outer), 1, inner)
    kept = float(core.square().sum())
    for _ in range(iterations):
        inner = _mode_vectors(_project(exact, 0, outer), 1, rank_in, like=kernel)
        half = _project(exact, 1, inner)
        outer = _mode_vectors(half, 0, rank_out, like=kernel)
        core = _project(half, 0, outer)
        before, kept = kept, float(core.square().sum())
        if kept - before <= tolerance * energy:
            break
    return outer, core, inner.mT


def unfold(kernel: Tensor, mode: int) -> Tensor:
    """Mode 0 or 1 of `[T, S, K]` as the rows of a matrix."""
    return kernel.movedim(mode, 0).flatten(1)


def _mode_vectors(kernel: Tensor, mode: int, rank: int, like: Tensor) -> Tensor:
    matrix = unfold(kernel, mode)
    # A projection of float32 weights is held in float64, but has no more digits: the fast route is exact enough.
    if like.dtype != torch.float64:
        matrix = matrix.float()
    return leading_vectors(matrix, rank)


def _project(kernel: Tensor, mode: int, vectors: Tensor) -> Tensor:
    product: Tensor = torch.tensordot(vectors.mT, kernel, dims=([1], [mode])).movedim(0, mode)
    return product
