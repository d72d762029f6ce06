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
LEAST_PENALTY = 1e-11  # at which the normal equations can still be solved
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

    def permuted(self, order: Sequence[int]) -> Terms:
        """Those of the tensor with its modes in another order."""
        return Terms(tuple(self.factors[mode] for mode in order))

    def balanced(self, scale: float = 1.0) -> Terms:
        """The same terms, times `scale`, with columns that are equally long in every mode."""
        lengths = [torch.linalg.vector_norm(factor, dim=0) for factor in self.factors]
        common = (scale * _product(lengths)) ** (1 / len(lengths))
        pairs = zip(self.factors, lengths, strict=True)
        return Terms(tuple(factor * (common / length.where(length > 0, 1.0)) for factor, length in pairs))


def expand(tensor: Tensor) -> Terms:
    """A tensor as orthogonal terms, exactly, largest first: as many as the product of all its sizes but the largest.

    Singular triples of its slices along the two longest modes, in the bases of all others' singular vectors (the
    higher-order SVD). Raises `ValueError` for entries that are not finite.
    """
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()  # which tells `svd` how many digits there are
    order = _by_length(tensor)
    core, bases = wide.permute(order), []
    for mode in range(2, core.dim()):
        basis = left_system(core.movedim(mode, 0).flatten(1))[1]
        core = (core.double().movedim(mode, -1) @ basis).movedim(-1, mode).to(wide.dtype)
        bases.append(basis)
    slices = core.reshape(*core.shape[:2], -1).permute(2, 0, 1)
    system = decompose(slices)
    left, right = system.truncate(slices.shape[2])
    place = torch.arange(len(slices), device=tensor.device).repeat_interleave(slices.shape[2])
    places = torch.unravel_index(place, core.shape[2:]) if bases else ()
    factors = [left.transpose(1, 2).flatten(0, 1).mT, right.flatten(0, 1).mT]
    factors += [basis[:, at] for basis, at in zip(bases, places, strict=True)]
    largest = system.energies.flatten().argsort(descending=True, stable=True)
    return Terms(tuple(factor[:, largest] for factor in factors)).balanced().permuted(_inverse(order))


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
    norm, order, generator = energy**0.5, _by_length(tensor), torch.Generator().manual_seed(0)
    scaled = tensor.double().permute(order) / norm
    starts = [first.permuted(order).balanced(1 / norm)]
    for _ in range(restarts):
        drawn = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in scaled.shape[1:]]
        factors = [torch.zeros(len(scaled), rank, dtype=torch.float64), *drawn]  # the first is found before it is used
        starts.append(Terms(tuple(factor.to(tensor.device) for factor in factors)))
    found = [_fit(scaled, starts[0]), *(_als(scaled, each, sweeps) for each in starts)]
    best = min(found, key=lambda each: each.error)
    return best.terms.balanced(norm).permuted(_inverse(order)), max(best.error, 0.0) * energy


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
    """Every factor in turn, given the others, of a tensor whose first two modes are its longest; the factors of the
    other ones twice, which costs little."""
    factors = list(terms.factors)
    grams = [factor.mT @ factor for factor in factors]

    def update(mode: int, product: Tensor) -> None:
        factors[mode] = _solve(product, [gram for i, gram in enumerate(grams) if i != mode], penalty)
        grams[mode] = factors[mode].mT @ factors[mode]

    for mode, other in ((0, 1), (1, 0)):
        partial = tensor.movedim((mode, other), (0, -1)) @ factors[other]  # [n, *short, R]
        update(mode, _contract(partial, factors[2:]))
        rest = (partial * factors[mode].view(len(partial), *[1] * (tensor.dim() - 2), -1)).sum(0)  # [*short, R]
        for i in range(2, tensor.dim()):
            product = _contract(rest.movedim(i - 2, 0), [*factors[2:i], *factors[i + 1 :]])
            update(i, product)
    overlap = _product(grams)
    error = 1 - 2 * float((product * factors[-1]).sum()) + float(overlap.sum())
    return _Fit(Terms(tuple(factors)).balanced(), error, float(overlap.diagonal().sum()))


def _solve(product: Tensor, grams: Sequence[Tensor], penalty: float) -> Tensor:
    """The factor `[n, R]` of one mode, from the Gram matrices of the others: normal equations with a penalty on squared
    norms of terms, each equation in units of its own diagonal."""
    gram = _product(grams)
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


def _by_length(tensor: Tensor) -> list[int]:
    """Its modes, the longest first."""
    return sorted(range(tensor.dim()), key=lambda mode: -tensor.shape[mode])


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
