"""Proximal steps: `argmin_X threshold ||X|| + 1/2 ||X - C||_F^2`, which make columns or singular values vanish."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.linalg.svd import decompose


def shrink_columns(matrix: Tensor, threshold: float, width: int = 1) -> tuple[Tensor, Tensor]:
    """Of `||X||_{2,1}`: every block of `width` neighbouring columns gets shorter by the threshold, or vanishes.

    C `[..., m, n]`; the norm is the sum of the blocks' Frobenius norms. Also these norms of the result,
    `[..., n / width]`, float64. G. Liu et al., Robust recovery of subspace structures by low-rank representation (TPAMI
    2013).
    """
    before = column_norms(matrix, width)
    after = (before - threshold).clamp(min=0.0)
    share = (after / before).where(after > 0, 0.0).repeat_interleave(width, -1)
    return matrix * share.unsqueeze(-2).to(matrix.dtype), after


def shrink_singular_values(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Of the nuclear norm: every singular value gets smaller by the threshold, or vanishes.

    C `[..., m, n]`. Also the singular values of the result, `[..., min(m, n)]`, largest first, float64; how many are
    above 0 is its rank. J.-F. Cai et al., A singular value thresholding algorithm for matrix completion (SIOPT 2010).
    Raises `ValueError` for entries that are not finite.
    """
    system = decompose(matrix)
    before = system.energies.sqrt()
    after = (before - threshold).clamp(min=0.0)
    share = (after / before).where(after > 0, 0.0)
    wide = matrix.double() if matrix.shape[-2] <= matrix.shape[-1] else matrix.double().mT
    kept = int((after > 0).reshape(-1, after.shape[-1]).any(0).sum())
    basis = system.basis[..., :kept]  # U, so that U D V^T = U (D / Sigma) U^T C
    product = basis * share[..., None, :kept] @ (basis.mT @ wide)
    product = product if wide.shape == matrix.shape else product.mT
    return product.to(matrix.dtype), after


def column_norms(matrix: Tensor, width: int = 1) -> Tensor:
    """Frobenius norms of blocks of `width` neighbouring columns: `[..., m, n]` to `[..., n / width]`, float64."""
    blocks: Tensor = matrix.double().unflatten(-1, (-1, width))
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(-3, -1))
    return norms
