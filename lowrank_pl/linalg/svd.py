"""Best low-rank approximation of matrices, batched, exact to float64 rounding.

For float32 and smaller types the Gram matrix of the shorter side is formed in float64 and diagonalized: singular
values come out to about 1e-8 of the largest, better than a float32 SVD and several times faster. float64 matrices,
for which a Gram matrix would lose half of the digits, get a true SVD.
"""

import torch
from torch import Tensor


def tail_energies(matrix: Tensor) -> Tensor:
    """What truncation loses: `tail[..., r] = min ||A - A_r||_F^2` over matrices `A_r` of rank r.

    Shapes: `[..., m, n]` to `[..., min(m, n) + 1]`, float64; `tail[..., 0]` is `||A||_F^2`, the last entry is 0.
    Raises `ValueError` for entries that are not finite.
    """
    energies = singular_energies(matrix)
    tails = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], dim=-1)


def singular_energies(matrix: Tensor) -> Tensor:
    """Squared singular values, largest first. Shapes: `[..., m, n]` to `[..., min(m, n)]`, float64."""
    if matrix.dtype == torch.float64:
        return _svd(matrix)[1].square()
    return _gram_eigh(_short_side_first(matrix.double()))[0]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best approximation of rank r: `left @ right`, `sqrt(sigma)` in each.

    Shapes: `[..., m, n]` to `[..., m, r]` and `[..., r, n]`, float64 whatever the input, so that the caller decides
    where rounding happens. Raises `ValueError` for a rank outside [1, min(m, n)] and for entries that are not finite.
    """
    if not 1 <= rank <= min(matrix.shape[-2:]):
        raise ValueError(f"Expected a rank in [1, {min(matrix.shape[-2:])}] but got {rank}")
    wide = _short_side_first(matrix.double())
    basis = _leading(wide, rank, exact=matrix.dtype == torch.float64)
    coordinates = basis.mT @ wide
    # The length of each row is its singular value, more exactly than the eigenvalue is; a row of length 0 stays 0.
    scale = torch.linalg.vector_norm(coordinates, dim=-1, keepdim=True).sqrt()
    left = basis * scale.mT
    right = coordinates / scale.where(scale > 0, 1.0)
    return (left, right) if wide.shape == matrix.shape else (right.mT, left.mT)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of `[..., m, n]`: `[..., m, rank]`, float64, orthonormal; rank at most m."""
    return _leading(matrix.double(), rank, exact=matrix.dtype == torch.float64)


def _leading(matrix: Tensor, rank: int, exact: bool) -> Tensor:
    """`leading_vectors` of a float64 matrix; with `exact` by SVD, since its entries have more digits than a Gram
    matrix keeps."""
    vectors = _svd(matrix, full=rank > matrix.shape[-1])[0] if exact else _gram_eigh(matrix)[1]
    return vectors[..., :rank]


def _short_side_first(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def _gram_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values `[..., m]` and left singular vectors `[..., m, m]`, largest first."""
    gram = matrix @ matrix.mT
    _check_finite(gram.diagonal(dim1=-2, dim2=-1))  # where every entry's square is summed up
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        left, singular, _ = _svd(matrix, full=True)
        missing = matrix.shape[-2] - singular.shape[-1]
        return torch.nn.functional.pad(singular.square(), (0, max(missing, 0))), left
    _check_result(values)
    return values.flip(-1).clamp(min=0.0), vectors.flip(-1)


def _svd(matrix: Tensor, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd`, and where that does not converge the other algorithm that the device has."""
    _check_finite(matrix)
    try:
        left, singular, right = torch.linalg.svd(matrix, full_matrices=full)
    except torch.linalg.LinAlgError:
        if matrix.is_cuda:
            left, singular, right = torch.linalg.svd(matrix, full_matrices=full, driver="gesvd")
        else:  # the CPU has one driver; on the transpose it takes another path
            right_t, singular, left_t = torch.linalg.svd(matrix.mT, full_matrices=full)
            left, right = left_t.mT, right_t.mT
    _check_result(singular)
    return left, singular, right


def _check_finite(entries: Tensor) -> None:
    if not torch.isfinite(entries.sum()):
        raise ValueError("Expected finite weights but found NaN or Inf; lower the learning rate or clip gradients")


def _check_result(values: Tensor) -> None:
    """An overflow inside LAPACK comes back as NaN, not as an error."""
    if not torch.isfinite(values.sum()):
        raise ValueError("The decomposition of finite weights overflowed; expected entries below 1e150")
