"""Tensor trains by truncated singular value decompositions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_pl.linalg.svd import leading_vectors, singular_energies, tail_energies


def tt_svd(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """`tensor[i_1, ..., i_d] ~ G_1[i_1] ... G_d[i_d]`, cores `[r_(k-1), p_k, r_k]`, float64: TT-SVD (Oseledets, SIAM J.
    Sci. Comput. 2011, algorithm 1).

    Tensor `[p_1, ..., p_d]`; `ranks` r_1 to r_(d-1), each at most that of its unfolding and `r_(k-1) p_k`. The squared
    error is at most the sum of what truncating the unfoldings alone would cost, see `tt_tails`. Cores are balanced: as
    the factors of an SVD with `sqrt(sigma)` on either side, and all of the same norm.
    """
    rest, before, cores = tensor.double(), tensor.new_ones(1, dtype=torch.float64), []
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        matrix = rest.reshape(len(before) * size, -1)
        # what is left of a float32 tensor is held in float64, but has no more digits: the fast route is exact enough
        vectors = leading_vectors(matrix if tensor.dtype == torch.float64 else matrix.float(), rank)
        rest = vectors.mT @ matrix
        scale = torch.linalg.vector_norm(rest, dim=1).sqrt()
        scale = scale.where(scale > 0, 1.0)
        cores.append(vectors.unflatten(0, (-1, size)) * scale / before[:, None, None])
        before = scale
    cores.append(rest.unsqueeze(2) / before[:, None, None])
    norms = torch.stack([torch.linalg.vector_norm(core) for core in cores])
    scales = (norms.log().mean().exp() / norms).where(norms[-1] > 0, 1.0)
    return [core * scale for core, scale in zip(cores, scales, strict=True)]


def tt_tails(tensor: Tensor) -> list[Tensor]:
    """What truncating each unfolding alone loses: for k from 1 to d - 1 `[min(p_1 ... p_k, p_(k+1) ... p_d) + 1]`, from
    rank 0 on, float64. Raises `ValueError` for entries that are not finite."""
    sizes = tensor.shape
    unfoldings = (tensor.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes)))
    return [tail_energies(singular_energies(matrix)) for matrix in unfoldings]
