"""What a decomposition is, what it finds out about a weight, and what is chosen from that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import SingularSystem
from lowrank_pl.structures import Constant, Dense, Layout, Rank, Structure


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
    """

    @final
    def candidates(self, layer: LayerSpec) -> tuple[Decomposition, ...]:
        return (self,) if self.unsupported(layer) is None else ()

    @abstractmethod
    def full_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank, at which the projection changes nothing. The smallest is all ones."""

    @abstractmethod
    def layout(self, layer: LayerSpec, rank: Rank) -> Layout:
        """What will be deployed at this rank, in integers: parameters, MACs and modules follow from it."""

    @abstractmethod
    def analyze(self, weight: Tensor, layer: LayerSpec) -> Analysis:
        """Decompose a weight, once for its spectrum and for its factors at any rank.

        Raises `ValueError` for weights that are not finite.
        """

    @final
    def factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Structure:
        """The projection of one weight at one rank, which is checked first. Raises what `analyze` and `Analysis.factor`
        raise."""
        self.check_rank(layer, rank)
        return self.analyze(weight.detach(), layer).factor(rank)

    @final
    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """Raise `ValueError` for a rank outside [1, full] in any entry."""
        full = self.full_rank(layer)
        if len(rank) != len(full) or not all(1 <= r <= most for r, most in zip(rank, full, strict=True)):
            raise ValueError(f"Expected a rank from {(1,) * len(full)} to {full} but got {rank}")


class Analysis(ABC):
    """One weight, decomposed: what each rank would lose, and the factors of any rank."""

    @property
    @abstractmethod
    def errors(self) -> tuple[Tensor, ...]:
        """Per entry of the rank, the squared error that truncation costs: float64 `[full + 1]`, from rank 0 on.

        Where the rank has several entries, the sum over them bounds the squared error of the projection from above.
        """

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
