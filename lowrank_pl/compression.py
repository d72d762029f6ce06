"""One network: which layer takes which structure at which rank, and the projection of all its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.choices import resolve, snake_case
from lowrank_pl.costs import Cost, charge, price
from lowrank_pl.decompositions import Cheapest, Constant, Decomposition, Dense, Rank, Structure, chosen, count_weights
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import spec_of
from lowrank_pl.linalg import squared_norm
from lowrank_pl.ranks import CompressionRatio, RankProblem, RankRule
from lowrank_pl.surgery import Trace, find_layers, obstacle
from lowrank_pl.targets import Targets, check_patterns, matches

DEFAULT_RANK = CompressionRatio(2.0)


@dataclass(frozen=True, eq=False)
class Compression:
    """One target: a layer, the decomposition of its weight and the rule for its rank."""

    name: str
    module: nn.Module
    layer: LayerSpec
    decomposition: Decomposition
    rule: RankRule

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def weight(self) -> Tensor:
        """The same memory, for computing without a graph."""
        return self.parameter.detach()

    def num_weights(self, rank: Rank) -> int:
        """Weights of the factors; of none at rank 0."""
        return _num_weights(self.decomposition, self.layer, rank) if any(rank) else 0

    def is_cheaper(self, rank: Rank) -> bool:
        """Whether the factors have fewer weights than the layer."""
        return self.num_weights(rank) < self.layer.num_weights

    def factor(self, weight: Tensor, rank: Rank) -> Structure:
        """The projection of a weight of this layer; `Dense` where the factors would not be cheaper.

        Raises `ValueError` that names the layer for a weight that is not finite.
        """
        if not any(rank):
            return Constant(self.layer, rank, self.weight)
        if not self.is_cheaper(rank):
            return Dense(self.layer, rank, weight)
        try:
            return self.decomposition.factor(weight, self.layer, rank)
        except ValueError as error:
            raise ValueError(f"Layer {self.name!r}: {error}") from error

    def cost(self, cost: Cost, rank: Rank) -> float:
        """What the layer costs at this rank: the dense layer where the factors would not be cheaper."""
        if any(rank) and not self.is_cheaper(rank):
            return charge(cost, self.layer)
        return price(cost, self.layer, self.decomposition, rank)

    def describe(self, rank: Rank) -> tuple[str, Rank | None]:
        """What becomes of the layer at this rank, in words, and the rank in that structure's own terms."""
        if not any(rank):
            return "constant", (0,)
        if not self.is_cheaper(rank):
            return "dense", None
        decomposition, own = chosen(self.decomposition, rank)
        return describe(decomposition), own

    def note(self, rank: Rank) -> str:
        """What a user should know about this rank: why it is not the one asked for, or why the layer stays dense."""
        if not any(rank):
            return "rank 0: its bias alone"
        if not self.is_cheaper(rank):
            decomposition, own = chosen(self.decomposition, rank)
            named = f"{describe(decomposition)} of rank {', '.join(map(str, own))}"
            return f"{named} has {self.num_weights(rank):,} weights"
        problem = RankProblem(self.name, self.layer, self.decomposition, self.weight)
        return self.rule.note(problem, rank) or ""


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

    def __init__(self, compressions: Sequence[Compression], dense: Mapping[str, str], specs: Mapping[str, LayerSpec]):
        self.compressions = list(compressions)
        self.dense = dict(dense)
        self.specs = dict(specs)

    def choose_ranks(self) -> dict[str, Rank]:
        """Every target's rank, from the weights as they are now; each rule is asked once.

        Raises `ValueError` that names the layer where a rule looks at weights that are not finite.
        """
        ranks: dict[str, Rank] = {}
        for rule in dict.fromkeys(id(c.rule) for c in self.compressions):
            members = [c for c in self.compressions if id(c.rule) == rule]
            problems = [RankProblem(c.name, c.layer, c.decomposition, c.weight) for c in members]
            found = members[0].rule(problems, others=self.others(members))
            ranks |= {c.name: tuple(rank) for c, rank in zip(members, found, strict=True)}
        return ranks

    def others(self, members: Sequence[Compression]) -> list[LayerSpec]:
        """All other layers of the network that run (or all, while none has been seen to)."""
        names = {c.name for c in members}
        seen = any(spec.inputs for spec in self.specs.values())
        return [spec for name, spec in self.specs.items() if name not in names and (spec.inputs or not seen)]

    def factor(self, ranks: Mapping[str, Rank]) -> dict[str, Structure]:
        """The projection of every target at these ranks; `Dense` where the factors would not be cheaper.

        Raises `ValueError` that names the layer for weights that are not finite.
        """
        return {c.name: c.factor(c.weight, ranks[c.name]) for c in self.compressions}

    def rows(self, ranks: Mapping[str, Rank]) -> list[Row]:
        """The plan as a table, in the network's order."""
        by_name = {c.name: c for c in self.compressions}
        rows = []
        for name, spec in self.specs.items():
            if name not in by_name:
                rows.append(Row(name, "dense", None, spec.num_weights, spec.num_weights, self.dense[name]))
                continue
            c, rank = by_name[name], ranks[name]
            weights = min(c.num_weights(rank), spec.num_weights)
            rows.append(Row(name, *c.describe(rank), spec.num_weights, weights, c.note(rank)))
        return rows

    def check_finite(self) -> None:
        """Raise `ValueError` with the layer's name if a target's weight holds NaN or Inf."""
        for c in self.compressions:
            if not torch.isfinite(c.weight.sum(dtype=torch.float64)):
                raise ValueError(
                    f"Layer {c.name!r}: expected finite weights but found NaN or Inf; all weights are left as they "
                    "were. Lower the learning rate or clip gradients"
                )


def make_plan(
    model: nn.Module,
    method: Any = "tiled_svd",
    rank: Any = None,
    targets: Targets | None = None,
    trace: Trace | None = None,
    training: bool = False,
) -> Plan:
    """Decide for every linear layer and convolution whether it takes part, and how.

    `method` and `rank` are a choice or a mapping from name patterns to choices, of which the first match wins. With a
    trace, layers that never ran stay dense; with `training`, frozen ones do. Raises `ValueError` for a pattern that
    matches no layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be a module but got {model!r:.100}")
    if not isinstance(targets, (Targets, type(None))):
        raise TypeError(f"Expected argument `targets` to be Targets(include=[...], ...) but got {targets!r:.100}")
    methods = resolve(method, Decomposition, "method")  # type: ignore[type-abstract]
    rules = resolve(DEFAULT_RANK if rank is None else rank, RankRule, "rank")  # type: ignore[type-abstract]
    layers = find_layers(model)
    dense = (targets or Targets()).left_out(model, trace)
    check_patterns(methods, layers, "method")
    check_patterns(rules, layers, "rank")
    specs: dict[str, LayerSpec] = {}
    compressions = []
    for name, module in layers.items():
        reason = obstacle(model, module)
        if reason and reason.startswith("lazy"):
            specs[name] = LayerSpec("linear", 0, 0)
            dense[name] = reason
            continue
        specs[name] = spec_of(module).with_(inputs=trace.inputs(name) if trace else ())
        decomposition, rule = _first_match(methods, name), _first_match(rules, name)
        reason = reason or _idle(name, trace) or dense.get(name) or _frozen(module, training)
        if reason is None and decomposition is None:
            reason = "no pattern in `method` matches it"
        elif reason is None and rule is None:
            reason = "no pattern in `rank` matches it"
        elif reason is None and decomposition is not None and decomposition.unsupported(specs[name]):
            reason = f"{type(decomposition).__name__} {decomposition.unsupported(specs[name])}"
        if reason is None and isinstance(decomposition, Cheapest) and rule is not None and not rule.compares:
            raise ValueError(
                f"Layer {name!r}: Cheapest chooses among structures by their cost, which {type(rule).__name__} does "
                "not weigh: expected a `rank` such as CostPenalty or CostBudget"
            )
        if reason is None and decomposition is not None and rule is not None:
            compressions.append(Compression(name, module, specs[name], decomposition, rule))
        else:
            dense[name] = str(reason)
    return Plan(compressions, dense, specs)


def describe(decomposition: Decomposition) -> str:
    """The decomposition's name with the values of its fields: `tiled_svd(64)`."""
    if isinstance(decomposition, Cheapest):
        return f"cheapest({', '.join(describe(member) for member in decomposition.members)})"
    fields = ", ".join(str(value) for value in vars(decomposition).values() if value is not None)
    return snake_case(type(decomposition).__name__) + (f"({fields})" if fields else "")


@torch.no_grad()
def write_weights_(plan: Plan, structures: Mapping[str, Structure]) -> float:
    """Put every projection in its weight's place and return `||w - w~||_F^2 / N(w)` over all targets."""
    squared, count = 0.0, 0
    for c in plan.compressions:
        projected = structures[c.name].reconstruct()
        squared += squared_norm(c.weight - projected)
        count += projected.numel()
        if projected.data_ptr() != c.weight.data_ptr():
            c.weight.copy_(projected)
    return squared / max(count, 1)


@cache
def _num_weights(decomposition: Decomposition, layer: LayerSpec, rank: Rank) -> int:
    """Remembered, because it is asked for at every distortion."""
    return count_weights(decomposition.stages(layer, rank))


def _first_match(choices: Mapping[str, Any], name: str) -> Any:
    return next((choice for pattern, choice in choices.items() if matches(name, [pattern])), None)


def _idle(name: str, trace: Trace | None) -> str | None:
    if trace is None:
        return None
    return trace.odd.get(name) or (None if name in trace.calls else "never called: another module reads its weight")


def _frozen(module: nn.Module, training: bool) -> str | None:
    return "frozen: requires_grad is False" if training and not module.weight.requires_grad else None
