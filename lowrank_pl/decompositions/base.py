"""What a decomposition is, what it finds out about a weight, and what is chosen from that."""

from __future__ import annotations

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

    @abstractmethod
    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        """The decompositions to choose among for this layer; at least one where it is supported."""


class Decomposition(Candidates):
    """A family of cheaper structures for a weight, indexed by a rank.

    Final subclasses are frozen dataclasses whose fields are the configuration. Weights come as PyTorch stores them.
    `least` is the smallest value of an entry of the rank; where it is 0, not all of them may be.
    """

    least: ClassVar[int] = 1

    @final
    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return (self,) if self.unsupported(layer) is None else ()

    @abstractmethod
    def full_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank, at which the projection changes nothing."""

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
        """Raise `ValueError` for a rank outside [least, full] in any entry, or 0 in all of them."""
        full = self.full_rank(layer)
        inside = len(rank) == len(full) and all(self.least <= r <= most for r, most in zip(rank, full, strict=True))
        if not inside or not any(rank):
            raise ValueError(f"Expected a rank from {(self.least,) * len(full)} to {full} but got {rank}")


class Analysis(ABC):
    """One weight, decomposed: what each rank would lose, and the factors of any rank."""

    @property
    @abstractmethod
    def errors(self) -> tuple[Tensor, ...]:
        """Per entry of the rank, the squared error that truncation costs: float64 `[full + 1]`, from rank 0 on.

        Where the rank has several entries, the sum over them bounds the squared error of the projection from above, and
        `errors_at` may know better. In a metric they are exact for `SVD`, and estimates for all others (see
        `Stagewise`); the first is the squared norm of the weight always.
        """

    def errors_at(self, ranks: Sequence[Rank]) -> list[float]:
        """The squared error of each rank, or a bound of it: the sum over its entries, where nothing better is known."""
        columns = zip(self.errors, zip(*ranks, strict=True), strict=True)
        return torch.stack([tails[list(entries)] for tails, entries in columns]).sum(0).tolist()

    @abstractmethod
    def factor(self, rank: Rank) -> Structure:
        """The projection, as factors in the weight's own type. Raises `ValueError` for a rank outside [1, full]."""


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
        tensors = structure.layout.refit(in_type(structure.tensors, torch.float64), self.weight.double(), self.metric)
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
