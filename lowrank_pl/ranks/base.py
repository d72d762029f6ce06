"""What a rank rule is, and what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from lowrank_pl.costs import Cost, Macs, resolve_cost
from lowrank_pl.decompositions import Analysis, Candidates, Choice, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import squared_norm
from lowrank_pl.metric import Metric
from lowrank_pl.structures import Dense, Rank, Structure


@dataclass(frozen=True, eq=False)
class RankProblem:
    """One layer whose rank is to be chosen: which structures may be, and the weight that they shall approximate.

    `cost_weight` multiplies the layer's cost where a rule weighs it against errors. `least` is the smallest rank
    allowed, 1, or 0 in learning-compression. Nearness is that of `metric`, or Frobenius norm. What has been found out
    about the weight is kept, so that its rank and its factors come from one decomposition.
    """

    name: str
    layer: LayerSpec
    method: Candidates
    weight: Tensor
    cost_weight: float = 1.0
    least: int = 1
    metric: Metric | None = None
    _analyses: dict[Decomposition, Analysis] = field(default_factory=dict, init=False, repr=False)

    @property
    def candidates(self) -> tuple[Decomposition, ...]:
        """The decompositions to choose among."""
        return self.method.candidates(self.layer)

    @property
    def decomposition(self) -> Decomposition:
        """The first of them, which is the only one for rules that do not weigh errors against costs."""
        return self.candidates[0]

    @cached_property
    def full(self) -> Rank:
        """Its largest rank."""
        return self.decomposition.full_rank(self.layer)

    @property
    def errors(self) -> tuple[Tensor, ...]:
        """Per entry of its rank, the squared error of truncation to 0, 1, ..., full."""
        return self.analysis(self.decomposition).errors

    def squared_norm(self, weight: Tensor) -> float:
        """Of a weight, or of the difference of two, in the sense of the metric."""
        return squared_norm(weight) if self.metric is None else self.metric.squared_norm(weight)

    def analysis(self, decomposition: Decomposition) -> Analysis:
        """The weight decomposed so, once. Raises `ValueError` that names the layer for a weight that is not finite."""
        if decomposition not in self._analyses:
            with self.named():
                self._analyses[decomposition] = decomposition.analyze(self.weight, self.layer, self.metric)
        return self._analyses[decomposition]

    def structure(self, choice: Choice) -> Structure:
        """The projection of the weight. Raises `ValueError` that names the layer for weights that are not finite."""
        if choice.decomposition is not None:
            analysis = self.analysis(choice.decomposition)
            with self.named():
                return analysis.factor(choice.rank)
        layout = choice.layout(self.layer)
        dense = isinstance(layout, Dense)
        return Structure(layout, choice.rank, (self.weight if dense else self.weight.new_empty(0),))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Give errors the layer's name."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"Layer {self.name!r}: {error}") from error

    def num_weights(self, rank: Rank) -> int:
        """Weights of the factors of its (only) decomposition."""
        return self.decomposition.layout(self.layer, rank).num_weights


class Others(tuple[LayerSpec, ...]):
    """The network's other layers, and its multiply-adds for one input that are in no layer at all."""

    macs: float

    def __new__(cls, layers: Iterable[LayerSpec], macs: float) -> Others:
        others = super().__new__(cls, layers)
        others.macs = macs
        return others


class RankRule(ABC):
    """Chooses the rank of every layer, seeing all layers at once. Final subclasses are frozen dataclasses."""

    @property
    def compares(self) -> bool:
        """Whether it weighs errors against costs, and so can choose among structures."""
        return False

    @property
    def sees_shapes_alone(self) -> bool:
        """Whether it chooses the same ranks whatever the weights are."""
        return False

    @property
    def weighs_macs(self) -> bool:
        """Whether multiply-adds are what it weighs errors against."""
        return False

    @abstractmethod
    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        """One choice per problem. A rank whose factors are not cheaper than the layer stands for the dense layer.

        `error_weight` multiplies squared errors against costs. `others` are the network's other layers, whose cost
        counts against a budget; as `Others` they also tell what no layer covers.
        """

    def check(self, problem: RankProblem) -> None:  # noqa: B027  # most rules can always choose
        """Raise `ValueError`, with the layer's name, where it cannot choose: before anything is trained."""

    def note(self, problem: RankProblem, rank: Rank) -> str | None:
        """What a user should know about this choice, for the report."""
        return None


class CostRule(RankRule):
    """A rule that weighs errors against a `cost`: its name, or any function from a `LayerSpec` to a number."""

    cost: str | Cost

    @property
    def compares(self) -> bool:
        return True

    @property
    def weighs_macs(self) -> bool:
        return isinstance(self.charged, Macs)

    @property
    def charged(self) -> Cost:
        """The cost as a function. Raises `ValueError` for an unknown name."""
        return resolve_cost(self.cost)
