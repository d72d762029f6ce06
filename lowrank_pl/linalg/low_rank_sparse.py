"""A matrix as the sum of a low-rank and a sparse one, nearest in a quadratic form.

Of the sum only the sparse part is looked for here: the low-rank one is the projection of what it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lowrank_pl.linalg.root import Root

ITERATIONS, TOLERANCE = 40, 3e-3  # of alternation, which ends where the error falls by a smaller share
GROWTH, POWER = 2, 4  # in so many iterations the rank is whole; updates of U and V between two of S
GRADIENTS = 4  # steps of conjugate gradients on the values, for each change of where they stand
HALVINGS = 3  # of how many values may move, before their places are given up


@final
@dataclass(frozen=True, eq=False)
class Quadratic:
    """`||left^(1/2) X right^(1/2)||_F^2` of matrices X `[..., m, n]`; None stands for 1."""

    left: Root | None = None
    right: Root | None = None

    def times(self, x: Tensor) -> Tensor:
        """`left X right`: half of the gradient."""
        return self.left_times(self.right_times(x))

    def left_times(self, x: Tensor) -> Tensor:
        """`left X`."""
        return x if self.left is None else _times(self.left, self._left, x.mT).mT

    def right_times(self, x: Tensor) -> Tensor:
        """`X right`."""
        return x if self.right is None else _times(self.right, self._right, x)

    def norm(self, x: Tensor) -> float:
        """The form itself."""
        return float((x * self.times(x)).sum())

    @cached_property
    def diagonal(self) -> Tensor:
        """What a single entry of size one has, `[..., m, n]` by broadcasting."""
        rows = torch.ones((), dtype=torch.float64) if self.left is None else _diagonal(self.left).unsqueeze(-1)
        return rows if self.right is None else rows * _diagonal(self.right).unsqueeze(-2)

    @cached_property
    def _left(self) -> Tensor | None:
        return _matrix(self.left)

    @cached_property
    def _right(self) -> Tensor | None:
        return _matrix(self.right)


def _matrix(root: Root | None) -> Tensor | None:
    """A square one, where the factor is."""
    return None if root is None or root.is_diagonal or root.floor is not None else root.matrix


def _times(root: Root, matrix: Tensor | None, x: Tensor) -> Tensor:
    if matrix is not None:
        return x @ matrix
    if root.is_diagonal:
        return x * root.factor.square().unsqueeze(-2)
    assert root.floor is not None
    return x @ root.factor @ root.factor.mT + x * root.floor[..., None, None]


def _diagonal(root: Root) -> Tensor:
    if root.is_diagonal:
        return root.factor.square()
    squares = root.factor.square().sum(-1)
    return squares if root.floor is None else squares + root.floor.unsqueeze(-1)


@dataclass
class Alternation:
    """Where the search for L + S near to `target` `[..., m, n]` stands: `low`, `sparse`, the `mask` of its `count`
    places, and the `gradient` (half of it) and the `error` of both. The error never rises."""

    target: Tensor
    form: Quadratic
    count: int

    def __post_init__(self) -> None:
        self.target = self.target.double()
        self.low, self.product, self.sparse = (torch.zeros_like(self.target) for _ in range(3))
        self.mask = torch.zeros_like(self.target, dtype=torch.bool)
        self.gradient = -self.form.times(self.target)
        self.error = self._error(self.sparse, self.gradient)
        self.most = self.count  # how many values may move at once

    @classmethod
    def at(cls, target: Tensor, form: Quadratic, low: Tensor, sparse: Tensor, mask: Tensor) -> Alternation:
        """From L + S that are known; the values then made least squares."""
        state = cls(target, form, int(mask.sum()))
        state.low, state.sparse, state.mask, state.most = low.double(), sparse.double(), mask, 0
        state.product = form.times(state.low)
        state.gradient = state.gradient + state.product + form.times(state.sparse)
        state.error = state._error(state.sparse, state.gradient)
        state.move_sparse()
        return state

    def move_low(self, low: Tensor, product: Tensor) -> None:
        """Another L, and what the form makes of it, `product`; unless that is worse."""
        gradient = self.gradient + product - self.product
        error = float(((low + self.sparse - self.target) * gradient).sum())
        if error <= self.error:
            self.low, self.product, self.gradient, self.error = low, product, gradient, error

    def move_sparse(self) -> None:
        """Values to where they gain most, as if nothing else moved, then all of them to least squares; of a step that
        makes the error larger half, a few times, and at last none at all."""
        for attempt in range(HALVINGS + 1):
            moved = self._moved() if attempt < HALVINGS else self.mask
            sparse = torch.where(moved, self.sparse, 0.0)
            gradient = self.gradient + self.form.times(sparse - self.sparse)
            sparse, gradient = self._least_squares(moved, sparse, gradient)
            error = self._error(sparse, gradient)
            if error <= self.error:
                self.mask, self.sparse, self.gradient, self.error = moved, sparse, gradient, error
                return
            self.most = max(self.most // 2, 1)

    def _error(self, sparse: Tensor, gradient: Tensor) -> float:
        return float(((self.low + sparse - self.target) * gradient).sum())

    def _moved(self) -> Tensor:
        """Where the values shall stand."""
        gains = self.form.diagonal * (self.sparse - self.gradient / self.form.diagonal).square()
        if int(self.mask.sum()) < self.count:
            return largest(gains, self.count)
        most = min(self.most, self.target.numel() - self.count)
        entering = gains.masked_fill(self.mask, -1.0).flatten().topk(most)
        leaving = gains.masked_fill(~self.mask, torch.inf).flatten().topk(most, largest=False)
        better = entering.values > leaving.values
        moved = self.mask.flatten().clone()
        moved[leaving.indices[better]], moved[entering.indices[better]] = False, True
        return moved.view(self.mask.shape)

    def _least_squares(self, mask: Tensor, sparse: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The values at these places by conjugate gradients, preconditioned by the diagonal."""
        residual = torch.where(mask, -gradient, 0.0)
        direction = near = residual / self.form.diagonal
        length = (residual * near).sum()
        for _ in range(GRADIENTS):
            product = self.form.times(direction)
            steepness = (direction * product).sum()
            if not steepness > 0:  # at the least one
                break
            step = length / steepness
            sparse, gradient = sparse + step * direction, gradient + step * product
            residual = torch.where(mask, residual - step * product, 0.0)
            near = residual / self.form.diagonal
            before, length = length, (residual * near).sum()
            direction = near + length / before * direction
        return sparse, gradient


def prune(target: Tensor, form: Quadratic, count: int) -> Alternation:
    """S alone: the largest entries, where the form is 1; else iterative hard thresholding (Blumensath & Davies, 2008)
    of the steps that `Alternation.move_sparse` describes."""
    return _alternate(Alternation(target, form, count), lambda state, i: None)


def godec(target: Tensor, form: Quadratic, count: int, project: Callable[[Tensor], Tensor]) -> Alternation:
    """L + S by a projection of what S leaves and hard thresholding of what L leaves, in turn: Zhou & Tao, GoDec (ICML
    2011), where the form is 1 and the projection truncates singular values. One that is no optimum may be worse than
    the L before, which is kept then."""

    def project_rest(state: Alternation, _: int) -> None:
        low = project(state.target - state.sparse)
        state.move_low(low, state.form.times(low))

    return _alternate(Alternation(target, form, count), project_rest)


def grebdec(target: Tensor, form: Quadratic, count: int, rank: int) -> Alternation:
    """L + S of this rank: algorithm 1 of Yu, Liu, Wang & Tao (CVPR 2017), without singular values.

    `L = U V` from QR decompositions alone, equation 7: `U = qr((M - S) A V^T)` and `V = U^T (M - S)`, in what `left`
    makes of rows. The rank grows greedily, by random projections of what U does not span (equation 8 has the gradient
    that U does span, which is zero right after 7). S takes steps as in `Alternation.move_sparse`, whose length fits
    every column and every step, instead of the paper's 1e-3.
    """
    left, generator = None if form.left is None else form.left.square, torch.Generator().manual_seed(0)
    bases = [torch.zeros_like(target[..., :0], dtype=torch.float64)]

    def rows(x: Tensor) -> Tensor:
        return x if left is None else left.times(x.mT).mT

    def grow(state: Alternation, i: int) -> None:
        rest = rows(state.target - state.sparse)
        grown = rank * (i + 1) // GROWTH if i + 1 < GROWTH else rank
        (basis,) = bases
        if basis.shape[-1] < grown:
            shape = (*rest.shape[:-1], grown - basis.shape[-1])
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(rest.device)
            basis = torch.cat([basis, drawn - basis @ (basis.mT @ drawn)], dim=-1)
        for _ in range(POWER):
            basis, _ = torch.linalg.qr(rest @ form.right_times(basis.mT @ rest).mT)
        bases[0], inner = basis, basis.mT @ rest
        outer = basis if left is None else left.solve(basis.mT).mT
        state.move_low(outer @ inner, form.left_times(outer) @ form.right_times(inner))

    return _alternate(Alternation(target, form, count), grow, GROWTH)


def _alternate(state: Alternation, move_low: Callable[[Alternation, int], None], least: int = 1) -> Alternation:
    for i in range(ITERATIONS):
        before = state.error
        move_low(state, i)
        if state.count:
            state.move_sparse()
        if i + 1 >= least and before - state.error <= TOLERANCE * before:
            break
    if int(state.mask.sum()) < state.count:  # nothing was left for all of them to do
        state.mask = largest(state.mask.double(), state.count)
    return state


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask of so many entries, those with the largest scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count, sorted=False).indices] = True
    return mask.view(scores.shape)
