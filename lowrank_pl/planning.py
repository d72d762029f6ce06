"""Which layers of a network take part, with which structures and which rule for their rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias, TypeVar

from torch import nn

from lowrank_pl.adapters import find_maps, obstacles
from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import Candidates, Decomposition, FirstOf
from lowrank_pl.decompositions.several import Several
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.names import resolve
from lowrank_pl.ranks import CompressionRatio, RankRule
from lowrank_pl.targets import Targets, check_patterns, matches
from lowrank_pl.tracing import NEVER_BUT_READ, READ, Trace

OneMethod: TypeAlias = str | Candidates | Sequence[str | Decomposition]
MethodChoice: TypeAlias = OneMethod | Mapping[str, OneMethod]
RankChoice: TypeAlias = str | RankRule | Mapping[str, str | RankRule]

T = TypeVar("T")

DEFAULT_RANK = CompressionRatio(2.0)


def make_plan(
    model: nn.Module,
    method: MethodChoice = "tiled_svd",
    rank: RankChoice | None = None,
    targets: Targets | None = None,
    trace: Trace | None = None,
    training: bool = False,
    joined: Collection[str] = (),
) -> Plan:
    """Decide for every linear layer and convolution whether it takes part, and how.

    `method` and `rank` are a choice or a mapping from name patterns to choices, of which the first match wins. Of a
    list of methods a layer gets the first that is for its kind. With a trace, layers that never ran stay dense; with
    `training`, frozen ones do, but for those that had `joined` before. Raises `ValueError` for a pattern that matches
    no layer, and for a method that names the shape of its layers but gets none of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be a module but got {model!r:.100}")
    if not isinstance(targets, (Targets, type(None))):
        raise TypeError(f"Expected argument `targets` to be Targets(include=[...], ...) but got {targets!r:.100}")
    methods = resolve(method, Candidates, "method", FirstOf)  # type: ignore[type-abstract]
    rules = rules_of(rank)
    maps = find_maps(model)
    dense = (targets or Targets()).left_out(maps, trace)
    check_patterns(methods, maps, "method")
    check_patterns(rules, maps, "rank")
    found = obstacles(model)
    specs: dict[str, LayerSpec] = {}
    compressions, frozen = [], []
    for name, each in maps.items():
        reason = found.get(name)
        if reason and reason.startswith("lazy"):
            specs[name], dense[name] = LayerSpec("linear", 0, 0), reason
            continue
        specs[name] = spec = trace.on(name, each.layer) if trace else each.layer
        reason = reason or _idle(name, trace) or dense.get(name)
        if reason in (READ, NEVER_BUT_READ) and each.adapter.shown_by_running:
            reason = f"a parameter of {type(each.module).__name__} that is not only multiplied by"
        if reason is None and trace is None and each.adapter.shown_by_running:
            reason = "how it is used is not known: give example_input"
        if reason is None and training and name not in joined and not any(p.requires_grad for p in each.parameters):
            reason = "frozen: requires_grad is False"
            frozen.append(each)
        own, rule = _first_match(methods, name), _first_match(rules, name)
        if isinstance(own, FirstOf) and own.unsupported(spec) is None:
            (own,) = own.candidates(spec)  # from here on as if it alone had been given
        own = own.by_stages() if own is not None and rule is not None and rule.weighs_macs else own
        reason = reason or _mismatch(name, spec, own, rule)
        if reason is None and own is not None and rule is not None:
            compressions.append(Compression(each, spec, own, rule))
        else:
            dense[name] = str(reason)
    _check_named(methods, specs)
    return Plan(compressions, dense, specs, trace, frozen)


def rules_of(rank: RankChoice | None) -> dict[str, RankRule]:
    """By pattern. Raises `ValueError` for an unknown name and `TypeError` for what is no rule."""
    return resolve(DEFAULT_RANK if rank is None else rank, RankRule, "rank")  # type: ignore[type-abstract]


def _check_named(methods: Mapping[str, Candidates], specs: Mapping[str, LayerSpec]) -> None:
    """Raise `ValueError` for a method whose arguments are for layers of one shape, if it is given to others alone."""
    for method in methods.values():
        given = [name for name, spec in specs.items() if spec.num_weights and _first_match(methods, name) is method]
        reasons = {name: method.unsupported(specs[name]) for name in given if method.names_its_layers}
        if reasons and all(reasons.values()):
            first: dict[str, str] = {}  # layer with each reason
            for name, reason in reasons.items():
                first.setdefault(str(reason), name)
            told = "; ".join(
                f"layer {name!r}: {type(method).__name__} {reason}" for reason, name in [*first.items()][-3:]
            )
            raise ValueError(f"{told[0].upper()}{told[1:]}; expected `method` to give it to such layers")


def _mismatch(name: str, layer: LayerSpec, method: Candidates | None, rule: RankRule | None) -> str | None:
    """Why what was given for a layer leaves it dense. Raises `ValueError` for a rule that cannot choose."""
    if method is None:
        return "no pattern in `method` matches it"
    if rule is None:
        return "no pattern in `rank` matches it"
    reason = method.unsupported(layer)
    if reason:
        return reason if isinstance(method, Several) else f"{type(method).__name__} {reason}"
    if not isinstance(method, Decomposition) and not rule.compares:
        raise ValueError(
            f"Layer {name!r}: {type(method).__name__} chooses among structures by their cost, which "
            f"{type(rule).__name__} does not weigh: expected a `rank` such as CostPenalty or CostBudget"
        )
    return None


def _first_match(choices: Mapping[str, T], name: str) -> T | None:
    return next((choice for pattern, choice in choices.items() if matches(name, [pattern])), None)


def _idle(name: str, trace: Trace | None) -> str | None:
    if trace is None:
        return None
    if name in trace.calls or name in trace.odd:
        return trace.odd.get(name)
    return "never called" if trace.batches == 1 else f"never called in {trace.batches} batches"
