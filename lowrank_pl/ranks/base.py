"""What a rank rule is, and what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lowrank_pl.decompositions import Decomposition, Rank, count_weights
from lowrank_pl.layer_spec import LayerSpec


@dataclass(frozen=True, eq=False)
class RankProblem:
    """One layer whose rank is to be chosen: which structure, and the weight that it shall approximate.

    `cost_weight` multiplies the layer's cost where a rule weighs it against errors. `least` is the smallest rank
    allowed, 1, or 0 in learning-compression; `most` the largest that any entry of it may have, where there is a cap.
    """

    name: str
    layer: LayerSpec
    decomposition: Decomposition
    weight: Tensor
    cost_weight: float = 1.0
    least: int = 1
    most: int | None = None

    @cached_property
    def full(self) -> Rank:
        """The largest rank."""
        return self.decomposition.full_rank(self.layer)

    @cached_property
    def spectra(self) -> tuple[Tensor, ...]:
        """Per entry of the rank, the squared error of truncation to 0, 1, ..., full."""
        return self.spectra_of(self.decomposition)

    def spectra_of(self, decomposition: Decomposition) -> tuple[Tensor, ...]:
        """The spectra of another structure for the same weight."""
        try:
            return decomposition.spectra(self.weight, self.layer)
        except ValueError as error:
            raise ValueError(f"Layer {self.name!r}: {error}") from error

    def num_weights(self, rank: Rank) -> int:
        """Weights of the factors."""
        return count_weights(self.decomposition.stages(self.layer, rank))


def at_fraction(full: Rank, fraction: float) -> Rank:
    """Every entry of the full rank times `fraction`: rounded half up, at least 1, at most full."""
    return tuple(min(max(int(most * fraction + 0.5), 1), most) for most in full)


class RankRule(ABC):
    """Chooses the rank of every layer, seeing all layers at once. Final subclasses are frozen dataclasses."""

    @property
    def compares(self) -> bool:
        """Whether it weighs errors against costs, and so can choose among structures."""
        return False

    @abstractmethod
    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Rank]:
        """One rank per problem, each entry in [least, full]; full stands for dense where factors are not cheaper.

        `error_weight` multiplies squared errors against costs. `others` are the network's other layers, whose cost
        counts against a budget.
        """

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        """What a user should know about this choice, for the report."""
        return None
