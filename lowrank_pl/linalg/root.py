"""Square roots of second moments: what distances that look at the data are measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

SHRINKAGE = 1e-6  # of the mean eigenvalue
CUTOFF = 1e-13  # of the largest eigenvalue: what is below is rounding


@final
@dataclass(frozen=True, eq=False)
class Root:
    """A positive definite matrix `A = F F^T + floor I`, `[..., n, n]`, by its factor.

    `factor` is F `[..., n, k]`, or the diagonal `[..., n]` of a diagonal one, `floor` `[...]`; float64. To a second
    moment `of`, `diagonal` and `from_samples` add a share, `shrinkage`, of its mean eigenvalue, so that it is definite
    however few samples it is of. In place of A = 0, of inputs that are always 0, there is 1.
    """

    factor: Tensor
    floor: Tensor | None = None
    is_diagonal: bool = False

    @classmethod
    def of(cls, matrix: Tensor, shrinkage: float = SHRINKAGE) -> Root:
        """From a second moment `[..., n, n]`."""
        exact = matrix.double()
        mean = exact.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        values, vectors = torch.linalg.eigh((exact + exact.mT) / 2)
        values = values.where(values > CUTOFF * values[..., -1:], 0.0) + shrinkage * mean
        # without shrinkage what lies in no direction is weighed by the cut-off, so that there is an inverse
        values = values.clamp(min=CUTOFF * values[..., -1:]).where(mean > 0, 1.0)
        return cls(vectors * values.sqrt().unsqueeze(-2))

    @classmethod
    def diagonal(cls, values: Tensor, shrinkage: float = SHRINKAGE) -> Root:
        """From the second moments `[..., n]` of inputs that are taken to be uncorrelated."""
        exact = values.double()
        mean = exact.mean(-1, keepdim=True)
        shrunk = exact + shrinkage * mean
        return cls(shrunk.clamp(min=CUTOFF * exact.amax(-1, keepdim=True)).where(mean > 0, 1.0).sqrt(), None, True)

    @classmethod
    def from_samples(cls, rows: Tensor, floor: Tensor, shrinkage: float = SHRINKAGE) -> Root:
        """With `rows^T rows + floor I` as the second moment, of rows `[..., k, n]` and floor `[...]`: for inputs so
        long that nobody wants a square matrix of them."""
        factor = rows.double().mT
        mean = factor.square().sum((-2, -1)) / factor.shape[-2] + floor
        return cls(factor, (floor + shrinkage * mean).where(mean > 0, 1.0))

    @property
    def size(self) -> int:
        """n."""
        return self.factor.shape[-1 if self.is_diagonal else -2]

    @property
    def matrix(self) -> Tensor:
        """A itself, `[..., n, n]`."""
        if self.is_diagonal:
            return torch.diag_embed(self.factor.square())
        product = self.factor @ self.factor.mT
        if self.floor is not None:
            product.diagonal(dim1=-2, dim2=-1).add_(self.floor.unsqueeze(-1))
        return product

    @property
    def square(self) -> Root:
        """The same with a square factor, that has an inverse."""
        return self if self.floor is None else Root.of(self.matrix, 0.0)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of A, of all batches."""
        if self.is_diagonal:
            return float(self.factor.square().max())
        spread = torch.linalg.matrix_norm(self.factor, 2).square()
        return float((spread if self.floor is None else spread + self.floor).max())

    def normalized(self, shrinkage: float) -> Root:
        """With so much of the mean eigenvalue added to all of them, and their mean 1 then, in every batch."""
        if self.is_diagonal:
            values = self.factor.square()
            return Root(_normalized(values, shrinkage).sqrt(), None, True)
        if self.floor is None:  # its columns are orthogonal, each as long as the root of an eigenvalue
            values = self.factor.square().sum(-2)
            return Root(self.factor * (_normalized(values, shrinkage) / values).sqrt().unsqueeze(-2))
        mean = self.factor.square().sum((-2, -1)) / self.size + self.floor
        whole = mean * (1 + shrinkage)
        return Root(self.factor / whole.sqrt()[..., None, None], (self.floor + shrinkage * mean) / whole)

    def bounded(self, most: float) -> Root:
        """With no eigenvalue above `most`."""
        if self.is_diagonal:
            return Root(self.factor.clamp(max=most**0.5), None, True)
        if self.floor is None:  # its columns are orthogonal, each as long as the root of an eigenvalue
            values = self.factor.square().sum(-2, keepdim=True)
            return Root(self.factor * (most / values).sqrt().clamp(max=1.0))
        values, vectors = torch.linalg.eigh(self.factor.mT @ self.factor)
        room = (most - self.floor).clamp(min=0.0).unsqueeze(-1)
        kept = (room / values.clamp(min=torch.finfo(values.dtype).tiny)).sqrt().clamp(max=1.0)
        return Root(self.factor @ (vectors * kept.unsqueeze(-2)), self.floor.clamp(max=most))

    def times(self, matrix: Tensor) -> Tensor:
        """`[..., m, n]` to `[..., m, k]`, whose products with each other are those of the matrix in A."""
        if self.is_diagonal:
            return matrix * self.factor.unsqueeze(-2)
        product = matrix @ self.factor
        if self.floor is None:
            return product
        return torch.cat([product, matrix.expand(*product.shape[:-1], -1) * self.floor.sqrt()[..., None, None]], dim=-1)

    def solve(self, matrix: Tensor) -> Tensor:
        """The inverse of `times`, for a square factor."""
        if self.is_diagonal:
            return matrix / self.factor.unsqueeze(-2)
        # its columns are orthogonal, each as long as the root of an eigenvalue
        return matrix @ (self.factor / self.factor.square().sum(-2, keepdim=True)).mT

    def divide(self, matrix: Tensor) -> Tensor:
        """`M A^-1`, for a square factor: `[..., m, n]` to the same shape."""
        if self.is_diagonal:
            return matrix / self.factor.square().unsqueeze(-2)
        half = self.factor / self.factor.square().sum(-2, keepdim=True)
        return matrix @ half @ half.mT

    def raised(self, by: Tensor) -> Root:
        """Of `A + by I`, `by` `[...]`, for a square factor."""
        if self.is_diagonal:
            return Root((self.factor.square() + by.unsqueeze(-1)).sqrt(), None, True)
        values = self.factor.square().sum(-2, keepdim=True)
        return Root(self.factor * (1 + by[..., None, None] / values).sqrt())

    def marginal(self, shape: Sequence[int], kept: Sequence[int]) -> Root:
        """Of inputs that are arrays of this `shape`, the matrix of those along the `kept` axes, summed up over the
        others: in what an array stands for when only these are seen."""
        if len(kept) == len(shape):
            return self
        other = [i for i in range(len(shape)) if i not in kept]
        lead = self.factor.dim() - (1 if self.is_diagonal else 2)
        if self.is_diagonal:
            values = self.factor.square().unflatten(-1, tuple(shape)).sum([lead + i for i in other]).flatten(lead)
            return Root.diagonal(values, 0.0)
        split = self.factor.unflatten(-2, tuple(shape))
        order = [*range(lead), *(lead + i for i in kept), *(lead + i for i in other), split.dim() - 1]
        rows = split.permute(order).flatten(lead, lead + len(kept) - 1).flatten(lead + 1)
        product = rows @ rows.mT
        if self.floor is not None:
            count = self.size // product.shape[-1]
            product.diagonal(dim1=-2, dim2=-1).add_(count * self.floor.unsqueeze(-1))
        return Root.of(product, 0.0)

    def blocks(self, start: int, count: int, size: int) -> Root:
        """The blocks on the diagonal, from `start` on, of `count` neighbouring parts: `[..., count, size, size]`."""
        part = slice(start, start + count * size)
        if self.is_diagonal:
            return Root(self.factor[..., part].unflatten(-1, (count, size)), None, True)
        rows = self.factor[..., part, :].unflatten(-2, (count, size))
        product = rows @ rows.mT
        if self.floor is not None:
            product.diagonal(dim1=-2, dim2=-1).add_(self.floor[..., None, None])
        return Root.of(product, 0.0)

    def part(self, index: Tensor) -> Root:
        """Of some of the inputs, `[..., j]`: the matrix in which arrays count that are 0 elsewhere."""
        if self.is_diagonal:
            return Root(self.factor.gather(-1, index), None, True)
        rows = self.factor.gather(-2, index.unsqueeze(-1).expand(*index.shape, self.factor.shape[-1]))
        product = rows @ rows.mT
        if self.floor is not None:
            product.diagonal(dim1=-2, dim2=-1).add_(self.floor.unsqueeze(-1))
        return Root.of(product, 0.0)

    def repeated(self, count: int) -> Root:
        """Of pairs of an input and one of so many places, at all of which it has this second moment: `A x 1`."""
        square = self.square
        if square.is_diagonal:
            return Root(square.factor.repeat_interleave(count, -1), None, True)
        eye = torch.eye(count, dtype=square.factor.dtype, device=square.factor.device)
        pairs = square.factor[..., :, None, :, None] * eye[:, None, :]
        return Root(pairs.flatten(-2).flatten(-3, -2))

    def unsqueeze(self, axis: int) -> Root:
        """With another batch axis, counted from the first."""
        floor = None if self.floor is None else self.floor.unsqueeze(axis)
        return Root(self.factor.unsqueeze(axis), floor, self.is_diagonal)

    def squeeze(self, axis: int) -> Root:
        """Without a batch axis of size 1, counted from the first."""
        floor = None if self.floor is None else self.floor.squeeze(axis)
        return Root(self.factor.squeeze(axis), floor, self.is_diagonal)

    def to(self, device: torch.device) -> Root:
        """On that device."""
        return Root(self.factor.to(device), None if self.floor is None else self.floor.to(device), self.is_diagonal)


def _normalized(values: Tensor, shrinkage: float) -> Tensor:
    return (values / values.mean(-1, keepdim=True) + shrinkage) / (1 + shrinkage)
