"""Alternating direction method of multipliers (ADMM) for matrices that are whole columns plus low rank:

`min R(M) + lambda_1 ||A||_{2,1} + lambda_2 ||B||_*`, subject to `A + B = M`,

R being how far the response of M is from a wanted one. C. Yu's lecture Low Rank Approximation (2021), "Unified
framework". Matrices are `[groups, m, n]`; all groups are one problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lowrank_pl.linalg.proximal import column_norms, shrink_columns, shrink_singular_values
from lowrank_pl.linalg.root import Root

RATIO, FACTOR = 10.0, 2.0  # of residual balancing: Boyd et al. (2011), 3.4.1
ITERATIONS, TOLERANCE = 300, 1e-3


@final
@dataclass(frozen=True)
class Norms:
    """`lambda_1 ||A||_{2,1} + lambda_2 ||B||_*`: the first sums up the norms of blocks of `width` neighbouring columns,
    which are one input channel at all kernel places, the second singular values. Matrices `[groups, m, n]`."""

    lambda_1: float
    lambda_2: float
    width: int = 1

    @classmethod
    def relative(cls, weight: Tensor, width: int, lambda_1: float, lambda_2: float) -> Norms:
        """Such that `A = weight` costs `lambda_1` and `B = weight` costs `lambda_2`, whatever its size and shape."""
        columns = float(column_norms(weight, width).sum())
        nuclear = float(shrink_singular_values(weight, 0.0)[1].sum())
        tiny = torch.finfo(torch.float64).tiny  # a weight of zeros costs nothing
        return cls(lambda_1 / max(columns, tiny), lambda_2 / max(nuclear, tiny), width)

    def value(self, a: Tensor, b: Tensor) -> float:
        """Of a pair."""
        nuclear = shrink_singular_values(b, 0.0)[1].sum()
        return float(self.lambda_1 * column_norms(a, self.width).sum() + self.lambda_2 * nuclear)


@final
@dataclass(frozen=True, eq=False)
class ADMMState:
    """A and B, the M that they were last fitted to, the multipliers Lambda of `A + B = M`, all `[groups, m, n]`, and
    the weight t of `t/2 ||A + B - M||^2`.

    `lag` bounds how far A is from its own minimum, given the others: how far B has moved since. `rank` is that of B,
    the largest of all groups.
    """

    m: Tensor
    a: Tensor
    b: Tensor
    multipliers: Tensor
    t: float
    lag: float = 0.0
    rank: int = 0

    @classmethod
    def at(cls, m: Tensor, t: float) -> ADMMState:
        """The start: nothing in A and B."""
        zeros = torch.zeros_like(m)
        return cls(m, zeros, zeros, zeros, t)

    @property
    def anchor(self) -> Tensor:
        """`A + B + Lambda / t`: M is drawn there by `t/2 ||M - anchor||^2`."""
        return self.a + self.b + self.multipliers / self.t

    def fitted(self, norms: Norms, rounds: int = 1) -> ADMMState:
        """With A and then B the best ones for M, given each other, so often in turn.

        One round is the lecture's; with more it approaches the method for two blocks of variables, of which convergence
        is proved in general. Raises `ValueError` for an M that is not finite.
        """
        wanted, b, before = self.m - self.multipliers / self.t, self.b, self.b
        for _ in range(rounds):
            before = b
            a, _ = shrink_columns(wanted - b, norms.lambda_1 / self.t, norms.width)
            b, values = shrink_singular_values(wanted - a, norms.lambda_2 / self.t)
        return replace(self, a=a, b=b, lag=_norm(b - before), rank=int((values > 0).sum(-1).max()))

    def channels(self, width: int) -> Tensor:
        """The blocks of columns, ascending, that A has: `[groups, c]`, as many in each group as any has, filled up with
        those that B is furthest from."""
        kept = column_norms(self.a, width) > 0
        count = int(kept.sum(1).max())
        missed = column_norms(self.m - self.b, width).masked_fill(kept, torch.inf)
        return missed.topk(count, dim=1).indices.sort(1).values

    def moved(self, m: Tensor) -> tuple[ADMMState, Residuals]:
        """With another M, and `Lambda + t (A + B - M)`."""
        gap = self.a + self.b - m
        multipliers = self.multipliers + self.t * gap
        primal = _share(_norm(gap), max(_norm(self.a + self.b), _norm(m)))
        dual = _share(self.t * (_norm(m - self.m) + self.lag), _norm(multipliers))
        return replace(self, m=m, multipliers=multipliers), Residuals(primal, dual)

    def balanced(self, residuals: Residuals) -> ADMMState:
        """With a larger t where the primal residual is ten times the dual one, with a smaller one where it is the other
        way round: Boyd et al. (2011), 3.4.1, with relative residuals, which have no units."""
        if residuals.primal > RATIO * residuals.dual:
            return replace(self, t=self.t * FACTOR)
        if residuals.dual > RATIO * residuals.primal:
            return replace(self, t=self.t / FACTOR)
        return self


@final
@dataclass(frozen=True)
class Residuals:
    """`||A + B - M||` as a share of the larger of both sides, and, as a share of `||Lambda||`, how far Lambda is from
    being a subgradient of both norms (Boyd et al., 2011, 3.3)."""

    primal: float
    dual: float

    @property
    def largest(self) -> float:
        return max(self.primal, self.dual)


class Response(ABC):
    """How far what M answers is from what is wanted."""

    @abstractmethod
    def value(self, m: Tensor) -> float:
        """As a share: 1 for an M that answers nothing."""

    @abstractmethod
    def nearest(self, target: Tensor, t: float, m: Tensor) -> Tensor:
        """`argmin_M R(M) + t/2 ||M - target||^2`; `m` is where to begin, where that has no closed form."""


@final
@dataclass(frozen=True, eq=False)
class LinearResponse(Response):
    """`E||y - M x||^2 / E||y||^2`, from the `root` of `E[x x^T]`, with an inverse, from `cross = E[y x^T]`, and from
    `energy = E||y||^2` over all groups."""

    root: Root
    cross: Tensor
    energy: float

    @classmethod
    def of(cls, weight: Tensor, root: Root | None = None) -> LinearResponse:
        """Of `y = weight x`; without a root of inputs with the second moment 1, so that it is
        `||weight - M||_F^2 / ||weight||_F^2`."""
        wide = weight.double()
        square = Root.diagonal(torch.ones_like(wide[:, 0]), 0.0) if root is None else root.square
        white = square.times(wide)
        cross = wide * square.factor.square().unsqueeze(-2) if square.is_diagonal else white @ square.factor.mT
        return cls(square, cross, max(float(white.square().sum()), torch.finfo(torch.float64).tiny))

    def value(self, m: Tensor) -> float:
        own = self.root.times(m).square().sum() - 2 * (m * self.cross).sum()
        return 1.0 + float(own) / self.energy

    def nearest(self, target: Tensor, t: float, m: Tensor) -> Tensor:
        """Where `2 (M E[x x^T] - E[y x^T]) / E||y||^2 + t (M - target)` is 0."""
        share = t * self.energy / 2
        raised = self.root.raised(torch.full_like(self.cross[:, 0, 0], share))
        return raised.divide(self.cross + share * target)


def solve(
    response: Response,
    start: Tensor,
    norms: Norms,
    t: float = 1.0,
    balance: bool = True,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
) -> tuple[ADMMState, list[Residuals]]:
    """A, B and M, from an M to start with, and the residuals on the way there. In float64.

    It ends when both residuals are below the tolerance. t is a multiple of `2 / ||start||^2`, of the curvature of a
    response to inputs that are all alike; it is balanced in the first half of the iterations alone, since convergence
    is proved for a t that settles.
    """
    m = start.double()
    state = ADMMState.at(m, 2 * t / max(float(m.square().sum()), torch.finfo(torch.float64).tiny))
    history: list[Residuals] = []
    for i in range(iterations):
        state = state.fitted(norms)
        state, residuals = state.moved(response.nearest(state.anchor, state.t, state.m))
        history.append(residuals)
        if residuals.largest < tolerance:
            break
        if balance and i < iterations // 2:
            state = state.balanced(residuals)
    return state, history


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.double()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float(part > 0)
