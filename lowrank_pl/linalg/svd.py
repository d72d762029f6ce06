"""Best low-rank approximation of matrices, batched, exact to float64 rounding.

For float32 and smaller types the Gram matrix of the shorter side is formed in float64 and diagonalized: singular
values come out to about 1e-8 of the largest, better than a float32 SVD and several times faster. float64 matrices,
for which a Gram matrix would lose half of the digits, get a true SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not exported for type checkers

from lowrank_pl.linalg.root import Root


@final
@dataclass(frozen=True, eq=False)
class SingularSystem:
    """A decomposed matrix `[..., m, n]`, whose spectrum and truncations all follow from one decomposition.

    `energies` are the squared singular values `[..., k]`, k = min(m, n), largest first; `basis` `[..., k, k]` are the
    singular vectors of the shorter side; float64. The matrix itself must not be written to meanwhile. With `left`
    `[..., m, m]` and `right` `[..., n, n]` they are those of `left^(1/2) A right^(1/2)`, and truncations are nearest in
    that sense.
    """

    matrix: Tensor
    energies: Tensor
    basis: Tensor
    left: Root | None = None
    right: Root | None = None

    @property
    def tails(self) -> Tensor:
        """What truncation loses: `tails[..., r] = min ||left^(1/2) (A - A_r) right^(1/2)||_F^2` over matrices `A_r` of
        rank r, `[..., k + 1]`.

        `tails[..., 0]` is that of `A_r = 0`, the last entry is 0.
        """
        return tail_energies(self.energies)

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of the best approximation of rank r, `left @ right`, balanced: `sqrt(sigma)` in each, or, where roots
        are given, norms alike.

        Shapes `[..., m, r]` and `[..., r, n]`, float64 whatever the matrix, so that the caller decides where rounding
        happens. Raises `ValueError` for a rank outside [1, min(m, n)].
        """
        if not 1 <= rank <= min(self.matrix.shape[-2:]):
            raise ValueError(f"Expected a rank in [1, {min(self.matrix.shape[-2:])}] but got {rank}")
        wide, side, _ = _short_side_first(self.matrix.double(), self.left, self.right)
        left = self.basis[..., :rank]
        # the other side needs no root: with U the leading vectors of `A right^(1/2)`, `A_r` is `U U^T A`
        right = left.mT @ (wide if side is None else side.times(wide.mT).mT)
        left = left if side is None else side.solve(left.mT).mT
        # The length of each row is its singular value, more exactly than the eigenvalue is; a row of length 0 stays 0.
        length = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
        scale = (length if side is None else length / torch.linalg.vector_norm(left, dim=-2).unsqueeze(-1)).sqrt()
        left = left * scale.mT
        right = right / scale.where(scale > 0, 1.0)
        return (left, right) if wide.shape == self.matrix.shape else (right.mT, left.mT)


def decompose(matrix: Tensor, left: Root | None = None, right: Root | None = None) -> SingularSystem:
    """The singular system of `[..., m, n]`, or of `left^(1/2) A right^(1/2)`.

    A float64 matrix by SVD, since its entries have more digits than a Gram matrix keeps. Raises `ValueError` for
    entries that are not finite.
    """
    left, right = (None if root is None else root.to(matrix.device) for root in (left, right))
    if matrix.shape[-2] > matrix.shape[-1]:
        right = None if right is None else right.square  # whose inverse is needed
    left = None if left is None else left.square
    wide, side, other = _short_side_first(matrix.double(), left, right)
    white = wide if side is None else side.times(wide.mT).mT
    white = white if other is None else other.times(white)
    if matrix.dtype == torch.float64:
        basis, singular, _ = _svd(white, full=white.shape[-1] < white.shape[-2])
        energies = torch.nn.functional.pad(singular.square(), (0, white.shape[-2] - singular.shape[-1]))
        return SingularSystem(matrix, energies, basis, left, right)
    return SingularSystem(matrix, *_gram_eigh(white), left, right)


def singular_energies(matrix: Tensor) -> Tensor:
    """Squared singular values alone, largest first. Shapes: `[..., m, n]` to `[..., min(m, n)]`, float64."""
    wide, _, _ = _short_side_first(matrix.double(), None, None)
    if matrix.dtype == torch.float64:
        return _svd(wide)[1].square()
    return _gram_eigh(wide, vectors=False)[0]


def tail_energies(energies: Tensor) -> Tensor:
    """What truncation loses: `tails[..., r] = sum_{a > r} energies[..., a]`. Shapes: `[..., k]` to `[..., k + 1]`."""
    tails = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], dim=-1)


def left_system(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values and left singular vectors of `[..., m, n]`, whichever side is shorter, largest first.

    Shapes: `[..., k]` and `[..., m, k]`, k = min(m, n), float64. Raises `ValueError` for entries that are not finite.
    """
    if matrix.dtype == torch.float64:
        left, singular, _ = _svd(matrix)
        return singular.square(), left
    return _left_gram_system(matrix.double(), min(matrix.shape[-2:]))


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of `[..., m, n]`: `[..., m, rank]`, float64, orthonormal; rank at most m."""
    if matrix.dtype == torch.float64:
        return _svd(matrix, full=rank > matrix.shape[-1])[0][..., :rank]
    return _left_gram_system(matrix.double(), rank)[1]


def squared_norm(weight: Tensor) -> float:
    """`||W||_F^2`, exact to about 1e-8: row by row, since one sum in float32 over millions of entries is not."""
    return float(torch.linalg.vector_norm(weight.flatten(1), dim=1).double().square().sum())


def _short_side_first(matrix: Tensor, left: Root | None, right: Root | None) -> tuple[Tensor, Root | None, Root | None]:
    return (matrix, left, right) if matrix.shape[-2] <= matrix.shape[-1] else (matrix.mT, right, left)


def _gram(matrix: Tensor, parts: int = 4) -> Tensor:
    """`matrix @ matrix.mT`; of a large one only the blocks on and below the diagonal, which are all that is read."""
    rows = matrix.shape[-2]
    if rows < 256:
        return matrix @ matrix.mT
    gram = matrix.new_zeros(*matrix.shape[:-2], rows, rows)
    for i in range(parts):
        first, last = i * rows // parts, (i + 1) * rows // parts
        gram[..., first:last, :last] = matrix[..., first:last, :] @ matrix[..., :last, :].mT
    return gram


def _gram_eigh(matrix: Tensor, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """Squared singular values `[..., m]` and left singular vectors `[..., m, m]`, largest first; without `vectors` an
    empty tensor in their place."""
    gram = _gram(matrix)
    check_finite(gram.diagonal(dim1=-2, dim2=-1))  # where every entry's square is summed up
    try:
        if vectors:
            values, basis = torch.linalg.eigh(gram)  # of the lower triangle, faster than of the upper one
        else:
            values, basis = torch.linalg.eigvalsh(gram), gram.new_empty(0)
    except LinAlgError:
        left, singular, _ = _svd(matrix, full=True)
        missing = matrix.shape[-2] - singular.shape[-1]
        return torch.nn.functional.pad(singular.square(), (0, max(missing, 0))), left
    _check_result(values)
    return values.flip(-1).clamp(min=0.0), basis.flip(-1)


def _left_gram_system(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Squared singular values `[..., min(m, n)]` and `rank` left singular vectors `[..., m, rank]` of `[..., m, n]`.

    From the Gram matrix of the shorter side. Vectors beyond n are orthonormal and otherwise arbitrary.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        energies, left = _gram_eigh(matrix)
        return energies, left[..., :rank]
    energies, right = _gram_eigh(matrix.mT)
    # A V = U Sigma has orthogonal columns. QR gives them length one, where sigma is 0 too.
    mode = "complete" if rank > matrix.shape[-1] else "reduced"
    left, _ = torch.linalg.qr(matrix @ right[..., :rank], mode=mode)
    return energies, left[..., :rank]


def _svd(matrix: Tensor, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`, and where that does not converge the other algorithm that the device has."""
    check_finite(matrix)
    try:
        left, singular, right = torch.linalg.svd(matrix, full_matrices=full)
    except LinAlgError:
        if matrix.is_cuda:
            left, singular, right = torch.linalg.svd(matrix, full_matrices=full, driver="gesvd")
        else:  # the CPU has one driver; on the transpose it takes another path
            right_t, singular, left_t = torch.linalg.svd(matrix.mT, full_matrices=full)
            left, right = left_t.mT, right_t.mT
    _check_result(singular)
    return left, singular, right


def check_finite(entries: Tensor) -> None:
    """Raise `ValueError` for entries that are not finite."""
    if not torch.isfinite(entries.sum()):
        raise ValueError("Expected finite weights but found NaN or Inf; lower the learning rate or clip gradients")


def _check_result(values: Tensor) -> None:
    """An overflow inside LAPACK comes back as NaN, not as an error."""
    if not torch.isfinite(values.sum()):
        raise ValueError("The decomposition of finite weights overflowed; expected entries below 1e150")
