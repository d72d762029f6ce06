"""One network: its targets, the choice of their ranks, and the projection of all their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap
from lowrank_pl.costs import Cost, price
from lowrank_pl.decompositions import DENSE, ZERO, Candidates, Cheapest, Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import squared_norm
from lowrank_pl.metric import Metric
from lowrank_pl.names import snake_case
from lowrank_pl.ranks import Others, RankProblem, RankRule
from lowrank_pl.structures import Rank, Structure
from lowrank_pl.tracing import Trace


@dataclass(frozen=True, eq=False)
class Compression:
    """One target: a linear map with its inputs, how its weight may be decomposed, and the rule for its rank."""

    map: LinearMap
    layer: LayerSpec
    method: Candidates
    rule: RankRule

    @property
    def name(self) -> str:
        return self.map.name

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What `write_` writes to. Raises `TypeError` if that is no parameter any more."""
        for tensor in self.map.parameters:
            if not isinstance(tensor, nn.Parameter):
                raise TypeError(
                    f"Layer {self.name!r}: expected its weight to stay a Parameter but it is a {type(tensor).__name__} "
                    "now, as torch.nn.utils.prune and parametrizations make it: do that before the fit, or after it"
                )
        return self.map.parameters

    def read(self) -> Tensor:
        """The whole weight, for computing without a graph; nobody may write to it."""
        return self.map.read()

    def write_(self, weight: Tensor) -> None:
        """Put another weight in its place, in memory that stays the same."""
        self.map.write_(weight)

    @property
    def is_called_once(self) -> bool:
        """Whether one call of it has been seen for one input, on inputs of one shape."""
        return self.map.is_layer and len(self.layer.inputs) == 1 and self.layer.inputs[0][0] == 1

    @cached_property
    def full(self) -> Rank:
        """The full rank of the (first) decomposition: the number that stands for dense in logs."""
        return self.method.candidates(self.layer)[0].full_rank(self.layer)

    def problem(
        self,
        weight: Tensor | None = None,
        cost_weight: float = 1.0,
        least: int = 1,
        metric: Metric | None = None,
    ) -> RankProblem:
        """What a rule sees of this layer; `weight` takes the place of its own."""
        weight = self.read() if weight is None else weight
        return RankProblem(self.name, self.layer, self.method, weight, cost_weight, least, metric)

    def num_weights(self, choice: Choice) -> int:
        """Weights of the factors; of none at rank 0."""
        return _num_weights(choice, self.layer)

    def is_cheaper(self, choice: Choice) -> bool:
        """Whether the factors have fewer weights than the layer."""
        return self.num_weights(choice) < self.layer.num_weights

    def settled(self, choice: Choice) -> Choice:
        """What is deployed: the dense layer where the factors would not be cheaper."""
        return choice if self.is_cheaper(choice) else DENSE

    def cost(self, cost: Cost, choice: Choice) -> float:
        """What the layer costs as it is deployed."""
        settled = self.settled(choice)
        return price(cost, settled, settled.layout(self.layer))

    def describe(self, choice: Choice) -> tuple[str, Rank | None]:
        """What becomes of the layer, in words, and the rank."""
        settled = self.settled(choice)
        if settled.decomposition is None:
            return settled.layout(self.layer).describe(), settled.rank or None
        return describe(settled.decomposition), settled.rank

    def note(self, choice: Choice) -> str:
        """What a user should know about this choice: why the rank is not the one asked for, or why the layer stays
        dense."""
        if choice == ZERO:
            return "rank 0: its bias alone"
        if choice.decomposition is None:
            return "nothing cheaper was chosen"
        if not self.is_cheaper(choice):
            named = f"{describe(choice.decomposition)} of rank {', '.join(map(str, choice.rank))}"
            return f"{named} has {self.num_weights(choice):,} weights"
        return self.rule.note(self.problem(), choice.rank) or ""

    def to_list(self, choice: Choice) -> list[int]:
        """A choice in a checkpoint: its rank, behind the number of the decomposition where there are several; all
        zeros at rank 0, the full rank for dense."""
        members = self.method.members if isinstance(self.method, Cheapest) else None
        if choice == ZERO:
            return [0] * (len(self.full) + (members is not None))
        decomposition = choice.decomposition or self.method.candidates(self.layer)[0]
        rank = choice.rank or self.full
        return [*([] if members is None else [members.index(decomposition)]), *rank]

    def from_list(self, values: Sequence[int]) -> Choice:
        """The inverse of `to_list`."""
        if not any(values):
            return ZERO
        decomposition, rank = self.method.candidates(self.layer)[0], tuple(values)
        if isinstance(self.method, Cheapest):
            decomposition, rank = self.method.members[values[0]], rank[1:]
        return DENSE if rank == decomposition.full_rank(self.layer) else Choice(decomposition, rank)


@dataclass(frozen=True)
class Row:
    """One line of the table that a plan prints: a layer, what becomes of it, and why."""

    name: str
    structure: str
    rank: Rank | None
    dense_weights: int
    weights: int
    note: str


class Plan:
    """Targets of one network, as `Compression`s, and the reasons why the other layers stay dense."""

    def __init__(
        self,
        compressions: Sequence[Compression],
        dense: Mapping[str, str],
        specs: Mapping[str, LayerSpec],
        trace: Trace | None = None,
        frozen: Sequence[LinearMap] = (),
    ) -> None:
        self._trace, self._frozen = Trace() if trace is None else trace, list(frozen)
        self.compressions = list(compressions)
        self.dense = dict(dense)
        self.specs = dict(specs)

    def has_thawed(self) -> bool:
        """Whether a layer that stays dense because it was frozen is trained by now."""
        return any(p.requires_grad for layer in self._frozen for p in layer.parameters)

    def leave_dense(self, names: Collection[str], reason: str) -> None:
        """These targets stay as they are."""
        self.dense |= {c.name: reason for c in self.compressions if c.name in names}
        self.compressions = [c for c in self.compressions if c.name not in names]

    @property
    def order(self) -> list[str]:
        """The targets in the order of running, as far as it is known."""
        names = {c.name: None for c in self.compressions}
        return list({name: None for name in self._trace.calls if name in names} | names)

    @property
    def parameters(self) -> list[Tensor]:
        """What projections write to, each once: several maps may lie in one parameter."""
        return list({id(p): p for c in self.compressions for p in c.parameters}.values())

    def problems(self, metrics: Mapping[str, Metric] | None = None) -> dict[str, RankProblem]:
        """What rules see of every target, with its weight as it is now.

        With metrics, errors of layers are made comparable, since those of late layers are small by nature: each counts
        in proportion to the layer's squared norm, or, where gradients say already what an error does to the loss, to
        its root, between absolute and relative errors (times the mean of these roots, so that the unit of gradients has
        no effect). Targets without a metric of their own keep to Frobenius norm.
        """
        if metrics is None:
            return {c.name: c.problem() for c in self.compressions}
        problems = {c.name: c.problem(metric=metrics.get(c.name)) for c in self.compressions}
        energies = {name: problem.squared_norm(problem.weight) for name, problem in problems.items()}
        with_gradients = {name for name, p in problems.items() if p.metric is not None and p.metric.outputs is not None}
        mean = sum(energies[name] ** 0.5 for name in with_gradients) / max(len(with_gradients), 1)
        weights = {name: e**0.5 * mean if name in with_gradients else e for name, e in energies.items()}
        return {name: replace(problem, cost_weight=weights[name]) for name, problem in problems.items()}

    def choose_ranks(self, problems: Mapping[str, RankProblem] | None = None) -> dict[str, Choice]:
        """Every target's structure and rank, from the weights as they are now; each rule is asked once.

        Raises `ValueError` that names the layer where a rule looks at weights that are not finite.
        """
        problems = self.problems() if problems is None else problems
        rules: dict[int, list[Compression]] = {}
        for c in self.compressions:
            rules.setdefault(id(c.rule), []).append(c)
        choices: dict[str, Choice] = {}
        for members in rules.values():
            found = members[0].rule([problems[c.name] for c in members], others=self.others(members))
            choices |= {c.name: choice for c, choice in zip(members, found, strict=True)}
        return {c.name: choices[c.name] for c in self.compressions}

    def others(self, members: Sequence[Compression]) -> Others:
        """All other layers that run (or all, while none has been seen to) in the networks of these, and what else is
        computed there."""
        names, seen = {c.name for c in members}, any(spec.inputs for spec in self.specs.values())
        network = self._trace.networks.get
        networks = {network(name) for name in names}
        specs = {name: spec for name, spec in self.specs.items() if name not in names and (spec.inputs or not seen)}
        others = [spec for name, spec in specs.items() if network(name) in networks]
        return Others(others, self._trace.rest_macs(names))

    def factor(
        self, choices: Mapping[str, Choice], problems: Mapping[str, RankProblem] | None = None
    ) -> dict[str, Structure]:
        """The projection of every target; its own weight where the factors would not be cheaper.

        Raises `ValueError` that names the layer for weights that are not finite.
        """
        problems = self.problems() if problems is None else problems
        return {c.name: problems[c.name].structure(c.settled(choices[c.name])) for c in self.compressions}

    def rows(self, choices: Mapping[str, Choice]) -> list[Row]:
        """The plan as a table, in the network's order."""
        by_name = {c.name: c for c in self.compressions}
        rows = []
        for name, spec in self.specs.items():
            if name not in by_name:
                rows.append(Row(name, "dense", None, spec.num_weights, spec.num_weights, self.dense[name]))
                continue
            c, choice = by_name[name], choices[name]
            weights = min(c.num_weights(choice), spec.num_weights)
            rows.append(Row(name, *c.describe(choice), spec.num_weights, weights, c.note(choice)))
        return rows

    def check_finite(self) -> None:
        """Raise `ValueError` with the layer's name if a target's weight holds NaN or Inf."""
        for c in self.compressions:
            if not torch.isfinite(c.read().sum(dtype=torch.float64)):
                raise ValueError(
                    f"Layer {c.name!r}: expected finite weights but found NaN or Inf; all weights are left as they "
                    "were. Lower the learning rate or clip gradients"
                )


def describe(decomposition: Candidates) -> str:
    """The decomposition's name with the values of its fields: `tiled_svd(64)`."""
    if isinstance(decomposition, Cheapest):
        return f"cheapest({', '.join(describe(member) for member in decomposition.members)})"
    values = [describe(x) if isinstance(x, Candidates) else x for x in vars(decomposition).values() if x is not None]
    fields = ", ".join(map(str, values))
    return snake_case(type(decomposition).__name__) + (f"({fields})" if fields else "")


@torch.no_grad()
def write_weights_(plan: Plan, structures: Mapping[str, Structure]) -> float:
    """Put every projection in its weight's place and return `||w - w~||_F^2 / N(w)` over all targets."""
    squared, count = 0.0, 0
    for c in plan.compressions:
        before, projected = c.read(), structures[c.name].reconstruct()
        squared += squared_norm(before - projected)
        count += projected.numel()
        if not torch.equal(before, projected):
            c.write_(projected)
    return squared / max(count, 1)


@cache
def _num_weights(choice: Choice, layer: LayerSpec) -> int:
    """Remembered, because it is asked for at every distortion."""
    return choice.layout(layer).num_weights
