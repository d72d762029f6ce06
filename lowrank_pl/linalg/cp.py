"""Canonical polyadic decomposition (CP) of tensors by alternating least squares (ALS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor

from lowrank_pl.linalg.svd import decompose, left_system, tail_energies

SWEEPS, TOLERANCE = 100, 1e-5  # at most so many, until one gains less than this share of the error
BOUND = 10.0  # of the terms' squared norms together, in squared norms of the tensor
PENALTY = 5e-3  # on them, times the share of the energy that is still missing
LEAST_PENALTY = 1e-12  # at which the normal equations can still be solved
EXACT = 1e-15  # a share of the energy that is rounding


@final
@dataclass(frozen=True, eq=False)
class Terms:
    """A tensor `[n_1, ..., n_N]` as a sum of rank-one terms: `factors[m]` is `[n_m, R]`, a column for each term, and
    equally long in every mode; float64."""

    factors: tuple[Tensor, ...]

    @property
    def energies(self) -> Tensor:
        """Their squared norms, `[R]`."""
        return _product([factor.square().sum(0) for factor in self.factors])

    @property
    def tails(self) -> Tensor:
        """What is missing without all terms but the first r, of terms that are orthogonal: `[R + 1]`."""
        return tail_energies(self.energies)

    def first(self, rank: int) -> Terms:
        """Some of them."""
        return Terms(tuple(factor[:, :rank] for factor in self.factors))

    def balanced(self, scale: float = 1.0) -> Terms:
        """The same terms, times `scale`, with columns that are equally long in every mode."""
        lengths = [torch.linalg.vector_norm(factor, dim=0) for factor in self.factors]
        common = (scale * _product(lengths)) ** (1 / len(lengths))
        pairs = zip(self.factors, lengths, strict=True)
        return Terms(tuple(factor * (common / length.where(length > 0, 1.0)) for factor, length in pairs))


def expand(tensor: Tensor) -> Terms:
    """A tensor as orthogonal terms, exactly, largest first: as many as the product of all its sizes but the largest.

    Singular triples of its slices along the two longest modes, in the bases of all others' singular vectors (the
    higher-order SVD). As the dtype of the tensor tells digits, so does the route (see `svd`). Raises `ValueError` for
    entries that are not finite.
    """
    order = sorted(range(tensor.dim()), key=lambda mode: -tensor.shape[mode])
    core, bases = tensor.permute(order), []
    for mode in range(2, core.dim()):
        basis = left_system(core.movedim(mode, 0).flatten(1))[1]
        bases.append(basis)
        core = (core.double().movedim(mode, -1) @ basis).movedim(-1, mode).to(tensor.dtype)
    slices = core.reshape(*core.shape[:2], -1).permute(2, 0, 1)
    system = decompose(slices)
    left, right = system.truncate(min(slices.shape[1:]))
    place = torch.arange(len(slices), device=tensor.device).repeat_interleave(right.shape[1])
    factors = [left.transpose(1, 2).flatten(0, 1).mT, right.flatten(0, 1).mT]
    for basis, at in zip(bases, torch.unravel_index(place, core.shape[2:]) if bases else (), strict=True):
        factors.append(basis[:, at])
    largest = system.energies.flatten().argsort(descending=True, stable=True)
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return Terms(tuple(factors[i][:, largest] for i in back)).balanced()


def cp_als(tensor: Tensor, start: Terms, rank: int, restarts: int = 0, sweeps: int = SWEEPS) -> tuple[Terms, float]:
    """`rank` terms near to a tensor, and the squared norm of what they leave: those that ALS comes to from the largest
    ones of `start`, made by `expand`, and from so many random ones; the best of them.

    Never worse than these largest ones. Where terms grow that cancel each other (no best approximation need exist: de
    Silva & Lim, 2008; what fine-tuning CP suffers from: Lebedev et al., ICLR 2015; Phan et al., ECCV 2020), their
    squared norms are held below `BOUND` times that of the tensor.
    """
    first, energy = start.first(rank), float(tensor.double().square().sum())
    if energy == 0 or sum(size > 1 for size in tensor.shape) <= 2:  # of a matrix the largest terms are the best
        return first, float(start.tails[rank])
    norm = energy**0.5
    scaled, generator = tensor.double() / norm, torch.Generator().manual_seed(0)
    starts = [first.balanced(1 / norm)]
    for _ in range(restarts):
        drawn = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in tensor.shape]
        starts.append(Terms((drawn[0].to(tensor.device) * 0, *(factor.to(tensor.device) for factor in drawn[1:]))))
    best = min((_als(scaled, each, sweeps) for each in starts), key=lambda found: found.error)
    return best.terms.balanced(norm), max(best.error, 0.0) * energy


@dataclass(frozen=True, eq=False)
class _Fit:
    """Terms, the share of the tensor's energy that they leave, and their squared norms."""

    terms: Terms
    error: float
    size: float

    def penalized(self, penalty: float) -> float:
        return self.error + penalty * self.size


def _als(tensor: Tensor, start: Terms, sweeps: int) -> _Fit:
    """From `start` downhill on `||tensor - sum of terms||^2 + penalty * sum of ||term||^2`, for a tensor of norm 1.

    The penalty falls with the error. Each sweep starts from where the last two point to; one that does not come
    down, or whose terms get too large, is not taken (Ang et al., Linear Algebra Appl. 2020).
    """
    best, at, reach, weight = _fit(tensor, start), start, 0.5, PENALTY
    for _ in range(sweeps):
        if best.error <= EXACT:
            break
        penalty = max(weight * best.error, LEAST_PENALTY)
        found = _sweep(tensor, at, penalty)
        gain = best.penalized(penalty) - found.penalized(penalty)
        if found.size > BOUND or gain < 0:
            if at is best.terms and gain < 0:
                break  # of rounding
            weight *= 2 if found.size > BOUND else 1
            at, reach = best.terms, reach / 1.5
            continue
        pairs = zip(found.terms.factors, best.terms.factors, strict=True)
        at, reach = Terms(tuple(new + reach * (new - old) for new, old in pairs)), min(1.05 * reach, 1.0)
        best = found
        if gain <= TOLERANCE * found.error:
            break
    return best


def _sweep(tensor: Tensor, terms: Terms, penalty: float) -> _Fit:
    """Every factor in turn, given the others; those of the shorter modes twice, which costs little."""
    factors = list(terms.factors)
    grams = [factor.mT @ factor for factor in factors]
    modes = sorted(range(len(factors)), key=lambda mode: -tensor.shape[mode])
    for mode, other in (modes[:2], modes[1::-1]):
        partial = tensor.movedim((mode, other), (0, -1)) @ factors[other]  # [n, *short, R]
        short = [factors[i] for i in sorted(modes[2:])]
        factors[mode] = _solve(_contract(partial, short), grams, mode, penalty)
        grams[mode] = factors[mode].mT @ factors[mode]
        rest = (partial * factors[mode].view(-1, *[1] * len(short), factors[mode].shape[1])).sum(0)  # [*short, R]
        for axis, i in enumerate(sorted(modes[2:])):
            others = [factors[j] for j in sorted(modes[2:]) if j != i]
            product = _contract(rest.movedim(axis, 0), others)
            factors[i] = _solve(product, grams, i, penalty)
            grams[i] = factors[i].mT @ factors[i]
            last = product, factors[i]
    overlap = _product(grams)
    error = 1 - 2 * float((last[0] * last[1]).sum()) + float(overlap.sum())
    return _Fit(Terms(tuple(factors)).balanced(), error, float(overlap.diagonal().sum()))


def _solve(product: Tensor, grams: Sequence[Tensor], mode: int, penalty: float) -> Tensor:
    """The factor `[n, R]` of one mode: normal equations with a penalty on squared norms of terms, each equation in
    units of its own diagonal."""
    gram = _product([other for i, other in enumerate(grams) if i != mode])
    squares = gram.diagonal()
    unit = squares.where(squares > 0, 1.0).rsqrt()
    scaled = gram * unit * unit.unsqueeze(1)
    scaled.diagonal().add_(penalty)
    return torch.cholesky_solve((product * unit).mT, torch.linalg.cholesky(scaled)).mT * unit


def _contract(partial: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`[n, *sizes, R]` with one factor `[size, R]` for each, term by term: `[n, R]`."""
    return reduce(lambda left, factor: (left * factor).sum(-2), reversed(factors), partial)


def _fit(tensor: Tensor, terms: Terms) -> _Fit:
    """Of a tensor of norm 1."""
    factors = terms.factors
    partial = tensor.movedim(0, -1) @ factors[0]
    inner = float((_contract(partial, factors[2:]) * factors[1]).sum())
    overlap = _product([factor.mT @ factor for factor in factors])
    return _Fit(terms, 1 - 2 * inner + float(overlap.sum()), float(overlap.diagonal().sum()))


def _product(matrices: Sequence[Tensor]) -> Tensor:
    return reduce(torch.mul, matrices)
