"""What a decomposition is, what it finds out about a weight, and what is chosen from that."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import SingularSystem
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Constant, Dense, Layout, Rank, Structure, in_type, sweep


class Candidates(ABC):
    """What is accepted as `method` for a layer: one decomposition, or several to choose among."""

    @abstractmethod
    def unsupported(self, layer: LayerSpec) -> str | None:
        """Why this layer cannot be decomposed so; None if it can."""

    @property
    def names_its_layers(self) -> bool:
        """Whether its arguments are for layers of one shape, so that it is a mistake if there are none."""
        return False

    @abstractmethod
    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        """The decompositions to choose among for this layer; at least one where it is supported."""

    def by_stages(self) -> Candidates:
        """The same, but what could also run dense, where that is left open, computes by its `stages`: for rules that
        weigh multiply-adds, of which a layer that runs dense saves none."""
        return self


class Decomposition(Candidates):
    """A family of cheaper structures for a weight, indexed by a rank.

    Final subclasses are frozen dataclasses whose fields are the configuration. Weights come as PyTorch stores them.
    `least` is the smallest value of an entry of the rank; where it is 0, not all of them may be.
    """

    least: ClassVar[int] = 1

    def by_stages(self) -> Decomposition:
        return self

    @final
    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return (self,) if self.unsupported(layer) is None else ()

    @abstractmethod
    def full_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank, at which the projection changes nothing."""

    def least_rank(self, layer: LayerSpec) -> Rank:
        """The smallest rank: all ones, or zeros where parts of a structure may be left out, but not all of them."""
        return (1,) * len(self.full_rank(layer))

    @property
    def spectral(self) -> Decomposition:
        """What the entries of the rank that count singular values belong to, which come first: itself, or the low-rank
        part of a sum."""
        return self

    def completed(self, layer: LayerSpec, ranks: Rank) -> Rank:
        """The rank whose entries of `spectral` are these, for rules that know of no others."""
        return ranks

    def at_fraction(self, layer: LayerSpec, fraction: float) -> Rank:
        """Every entry of the full rank times `fraction`: rounded half up, at least 1, at most full."""
        return tuple(min(max(int(most * fraction + 0.5), 1), most) for most in self.full_rank(layer))

    def within(self, layer: LayerSpec, weights: float) -> Rank:
        """The largest rank with at most so many weights, its entries growing together; the smallest one where even that
        has more."""
        full = self.full_rank(layer)
        # the fractions at which an entry is rounded up
        steps = sorted({(i - 0.5 + 1e-9) / most for most in full for i in range(1, most + 1)})

        def stored(step: float) -> int:
            return self.layout(layer, self.at_fraction(layer, step)).num_weights

        return self.at_fraction(layer, steps[max(bisect.bisect_right(steps, weights, key=stored) - 1, 0)])

    def values(self, layer: LayerSpec, most: int) -> tuple[list[int], ...]:
        """Per entry of the rank the values that rules try: all of a single entry; of several about `most` each, evenly
        spaced."""
        full = self.full_rank(layer)
        steps = [1 if len(full) == 1 else -(-entry // most) for entry in full]
        axes = zip(full, steps, strict=True)
        least = self.least_rank(layer)[0]
        return tuple(sorted({least, 1, *range(step, entry + 1, step), entry}) for entry, step in axes)

    @abstractmethod
    def layout(self, layer: LayerSpec, rank: Rank) -> Layout:
        """What will be deployed at this rank, in integers: parameters, MACs and modules follow from it."""

    @abstractmethod
    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        """Decompose a weight, once for its spectrum and for its factors at any rank, nearest in a metric, by default
        in Frobenius norm.

        Raises `ValueError` for weights that are not finite.
        """

    @final
    def factor(self, weight: Tensor, layer: LayerSpec, rank: Rank, metric: Metric | None = None) -> Structure:
        """The projection of one weight at one rank, which is checked first. Raises what `analyze` and `Analysis.factor`
        raise."""
        self.check_rank(layer, rank)
        return self.analyze(weight.detach(), layer, metric).factor(rank)

    @final
    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """Raise `ValueError` for a rank outside [least, full] in any entry, and for one that leaves nothing."""
        if not self.is_rank(layer, rank):
            least, full = self.least_rank(layer), self.full_rank(layer)
            something = "" if all(least) else ", with a part that is above 0,"
            raise ValueError(f"Expected a rank from {least} to {full}{something} but got {rank}")

    def is_rank(self, layer: LayerSpec, rank: Rank) -> bool:
        """Whether there is such a rank."""
        least, full = self.least_rank(layer), self.full_rank(layer)
        inside = len(rank) == len(full) and all(a <= r <= b for a, r, b in zip(least, rank, full, strict=True))
        return inside and any(rank)


class Analysis(ABC):
    """One weight, decomposed: what each rank would lose, and the factors of any rank."""

    @property
    @abstractmethod
    def errors(self) -> tuple[Tensor, ...]:
        """Per entry of the rank, the squared error that truncation costs: float64 `[full + 1]`, from rank 0 on.

        Where the rank has several entries, they are what each would cost alone: the error of the projection is at most
        their sum where each truncates the weight (Tucker-2), and at most any of them where each stands for a part of a
        sum (`LowRankPlusSparse`); see `tails`. That of a tensor train is at most the only entry's. In a metric they are
        exact for `SVD`, and estimates for all others (see
        `Stagewise`); the first is the squared norm of the weight always.
        """

    def tails(self, others: Rank = ()) -> Tensor:
        """The squared error at the values 0, 1, ..., full of the last entry of the rank, the `others` being given:
        exact where it is the only one, else at most that, an estimate in a metric. float64 `[full + 1]`."""
        *errors, last = self.errors
        return last + sum(float(each[r]) for each, r in zip(errors, others, strict=True))

    @abstractmethod
    def factor(self, rank: Rank) -> Structure:
        """The projection, as factors in the weight's own type. Raises `ValueError` for what is no rank."""


@final
@dataclass(frozen=True, eq=False)
class Truncation(Analysis):
    """The analysis of decompositions that truncate singular systems of matrices `[..., m, n]`, all at one rank.

    `arrange` makes the tensors of the layout from the float64 factors `[..., m, r]` and `[..., r, n]` of each.
    """

    decomposition: Decomposition
    layer: LayerSpec
    systems: Sequence[SingularSystem]
    arrange: Callable[[LayerSpec, Layout, list[tuple[Tensor, Tensor]]], Sequence[Tensor]]

    @property
    def errors(self) -> tuple[Tensor, ...]:
        (full,) = self.decomposition.full_rank(self.layer)
        total = self.systems[0].energies.new_zeros(full + 1)
        for system in self.systems:
            tails = system.tails
            total[: tails.shape[-1]] += tails.reshape(-1, tails.shape[-1]).sum(0)
        return (total,)

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        factors = [system.truncate(min(rank[0], system.energies.shape[-1])) for system in self.systems]
        dtype, layout = self.systems[0].matrix.dtype, self.decomposition.layout(self.layer, rank)
        tensors = self.arrange(self.layer, layout, [(a.to(dtype), b.to(dtype)) for a, b in factors])
        return Structure(layout, rank, tuple(tensors))


@final
@dataclass(frozen=True, eq=False)
class Stagewise(Analysis):
    """The analysis, in a metric, of structures for which the nearest one has no closed form.

    `marginal` is that of the weight with each stage in what the metric is for the inputs that this stage sees alone;
    then the last factors are refitted in the whole metric. Where that is not nearer than the projection in Frobenius
    norm, as it may happen where inputs are correlated across blocks, that projection is refitted instead: the result is
    never worse. `errors` are those of the marginal metrics, in proportion to the squared norm: estimates.
    """

    decomposition: Decomposition
    layer: LayerSpec
    weight: Tensor
    metric: Metric
    marginal: Analysis

    @cached_property
    def errors(self) -> tuple[Tensor, ...]:
        energy, estimates = self.metric.squared_norm(self.weight), self.marginal.errors
        return tuple(tails * (energy / tails[0]) if tails[0] > 0 else tails for tails in estimates)

    def factor(self, rank: Rank) -> Structure:
        found = self._refitted(self.marginal.factor(rank))
        plain = self._plain.factor(rank)
        return found if self._error(found) <= self._error(plain) else self._refitted(plain)

    @cached_property
    def _plain(self) -> Analysis:
        return self.decomposition.analyze(self.weight, self.layer)

    def _refitted(self, structure: Structure) -> Structure:
        exact: Sequence[Tensor] = in_type(structure.tensors, torch.float64)
        tensors: Sequence[Tensor] = structure.layout.refit(exact, self.weight.double(), self.metric)
        if self._error(structure.with_tensors(tensors)) > self._error(structure.with_tensors(exact)):
            tensors = exact  # some refits take all outputs to weigh alike
        for _ in range(self.metric.sweeps):
            tensors = sweep(structure.layout, tensors, self.weight, self.metric)
        return structure.with_tensors(in_type(tensors, self.weight.dtype))

    def _error(self, structure: Structure) -> float:
        return self.metric.squared_norm(self.weight - structure.reconstruct())


@final
@dataclass(frozen=True)
class Choice:
    """What one layer shall be: `decomposition` at `rank`, or `DENSE`, its own weight, or `ZERO`, its bias alone.

    A value: two that are equal deploy alike.
    """

    decomposition: Decomposition | None
    rank: Rank

    def layout(self, layer: LayerSpec) -> Layout:
        """What this deploys for a layer."""
        if self.decomposition is not None:
            return self.decomposition.layout(layer, self.rank)
        return Constant(layer) if self == ZERO else Dense(layer)


DENSE = Choice(None, ())
ZERO = Choice(None, (0,))
