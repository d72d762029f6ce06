"""What a network's linear maps are given on samples: moments, in one pass of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap
from lowrank_pl.compression import Compression, Plan
from lowrank_pl.layers import LAYER_TYPES
from lowrank_pl.methods.running import Over, evaluated, named, seeded
from lowrank_pl.metric import Metric
from lowrank_pl.moments import Moments, draw, listening, warn_of_few
from lowrank_pl.samples import Samples, as_call
from lowrank_pl.surgery import detached_copy
from lowrank_pl.terminal import progress
from lowrank_pl.tracing import Call


@dataclass(frozen=True)
class Collected:
    """Moments of what every target is given, on the samples and on those held back. Targets whose inputs nobody knows
    (parameters that others multiply by) have none."""

    fitted: dict[str, Moments]
    held: dict[str, Moments]
    _metrics: dict[tuple[str, bool], Metric] = field(default_factory=dict, repr=False)  # which take long to make

    def metrics(self, plan: Plan, centred: bool = False) -> dict[str, Metric]:
        """The metric of what every target is given: of second moments, or of covariances where the bias can move."""
        found = {}
        for c in progress(plan.compressions, "Second moments"):
            m = self.fitted.get(c.name)
            if m is not None:
                key = c.name, centred and moves_bias(c, m)
                found[c.name] = self._metrics[key] = self._metrics.get(key) or m.metric(key[1])
        return found


def collect(model: nn.Module, compressions: Sequence[Compression], samples: Samples) -> Collected:
    """One pass of a copy over the samples. Raises `ValueError` that names the layer and the batch for inputs that are
    not finite, and the batch on which the network does not run; warns where there are fewer vectors than inputs."""
    layers = {c.name: c.layer for c in compressions}
    collected = Collected({}, {})
    number, into = 0, collected.fitted

    def hear(name: str, each: LinearMap, x: Tensor) -> None:
        m = into.setdefault(name, Moments(layers[name]))
        with named(name, number):
            m.add(draw(x, m.layer, samples.places, seed=number))

    model = detached_copy(model)
    ran: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in model.modules()]
    with evaluated(model), listening(model, layers, hear):
        for number, is_held, batch in progress(samples.batches(), "Looking at data"):
            into = collected.held if is_held else collected.fitted
            with seeded(model, number):
                samples.run(model, batch)
            for handle in handles:
                handle.remove()
            if not ran:
                raise ValueError(
                    "Expected argument `forward` to run the network that it is given, a copy, but none of its modules "
                    "was called: give Samples(loader, forward=lambda model, batch: model(...))"
                )
    warn_of_few(collected.fitted)
    return collected


def first_call(model: nn.Module, samples: Samples) -> Call | None:
    """What the network is called with for the first batch; None if `forward` calls its parts alone."""
    _, _, batch = next(samples.batches())
    if samples.forward is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return as_call(model, samples.moved(batch, device))
    calls: list[Call] = []

    def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        raise Over

    model = detached_copy(model)
    model.register_forward_pre_hook(hear, with_kwargs=True)
    with evaluated(model), suppress(Over), seeded(model, 0):
        samples.run(model, batch)
    return calls[0] if calls else None


def can_move_bias(each: LinearMap) -> bool:
    """Whether the layer can get another bias, and one number for each output is what makes up for a mean."""
    is_plain = isinstance(each.module, LAYER_TYPES) and "bias" in each.module._parameters  # neither pruned nor computed
    return is_plain and each.layer.kind != "conv_transpose"


def moves_bias(c: Compression, m: Moments) -> bool:
    return can_move_bias(c.map) and not m.is_long
