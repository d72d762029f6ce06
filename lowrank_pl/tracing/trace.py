"""What was heard of the layers of a network while it ran."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.names import under
from lowrank_pl.tracing.calls import Call

READ = "its weight is read by another module, too"
NEVER_BUT_READ = "never called: another module reads its weight"


@dataclass
class Trace:
    """Which layers ran on one batch or several, in which order, on inputs of which shape."""

    # name -> {spatial size: vectors in all batches}; plain containers, since callbacks store it in checkpoints. What
    # ran once for a whole batch (on a table of relative positions, say) counts as if once for every input.
    calls: dict[str, dict[tuple[int, ...], float]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    normed: list[str] = field(default_factory=list)  # layers whose output goes straight into batch norm
    batch: int = 1  # inputs of the network in all batches
    batches: int = 1
    # layer -> the module that `training_step` called with data, in which or behind which it ran
    networks: dict[str, str] = field(default_factory=dict)
    # of these modules: multiply-adds outside of all layers, in all batches; None where nobody counted (before 0.2)
    rest: dict[str, int] | None = field(default_factory=dict)
    called: list[str] = field(default_factory=list)  # what `training_step` itself called
    # what that, the whole model and its children were called with: a few of the inputs
    arguments: dict[str, Call] = field(default_factory=dict)

    def on(self, name: str, spec: LayerSpec) -> LayerSpec:
        """A layer with its `inputs` and its `share`, as it ran on average for one input of the network."""
        sizes = self.calls.get(name)
        if sizes is None:
            return spec
        if not sizes:  # it has run, but is not multiplied by, or nobody knows how
            return spec.with_(inputs=((0,) * (len(spec.kernel) + 1),))
        inputs = tuple((math.ceil(n / self.batch), *size) for size, n in sizes.items())
        average = sum(n * math.prod(size) for size, n in sizes.items()) / self.batch
        return spec.with_(inputs=inputs, share=average / sum(math.prod(each) for each in inputs))

    def inputs(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Its `inputs`; empty if it never ran."""
        return self.on(name, LayerSpec("linear", 0, 0)).inputs

    def rest_macs(self, names: Collection[str]) -> float:
        """Multiply-adds for one input, in the networks of these layers, that are in no layer at all."""
        networks = {self.networks.get(name, "") for name in names}
        return sum((self.rest or {}).get(network, 0) for network in networks) / self.batch

    def add(self, other: Trace) -> None:
        """What was heard of further batches."""
        for name, sizes in other.calls.items():
            mine = self.calls.setdefault(name, {})
            for size, n in sizes.items():
                mine[size] = mine.get(size, 0) + n
        for name, network in other.networks.items():
            join(self.networks, name, network)
        if self.rest is not None:
            for network, macs in (other.rest or {}).items():
                self.rest[network] = self.rest.get(network, 0) + macs
        self.batch, self.batches = self.batch + other.batch, self.batches + other.batches
        self.odd |= other.odd
        self.normed += [name for name in other.normed if name not in self.normed]
        self.called += [name for name in other.called if name not in self.called]
        self.samples = other.samples | self.samples
        self.arguments = other.arguments | self.arguments

    def hear_reads(self, names: Collection[str]) -> None:
        """Other modules have read the weights of these layers."""
        self.odd |= {name: READ if name in self.calls else NEVER_BUT_READ for name in names}

    def under(self, name: str) -> Trace:
        """What was heard of one submodule, under its own names."""
        if not name:
            return self
        return Trace(
            calls=under(name, self.calls),
            samples=under(name, self.samples),
            batch=self.batch,
            batches=self.batches,
            rest=None if self.rest is None else under(name, self.rest),
            called=list(under(name, dict.fromkeys(self.called))),
            arguments=under(name, self.arguments),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, without the samples."""
        calls = [[name, [[*size, n] for size, n in sizes.items()]] for name, sizes in self.calls.items()]
        counts = {"batch": self.batch, "batches": self.batches, "rest": None if self.rest is None else dict(self.rest)}
        networks = dict(self.networks)
        return {"calls": calls, "odd": dict(self.odd), "normed": list(self.normed), "networks": networks, **counts}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trace:
        """The inverse of `state_dict`, for those of 0.1 and 0.2 too."""
        calls = {name: {tuple(size): n for *size, n in sizes} for name, sizes in state["calls"]}
        found = cls(calls=calls, odd=dict(state["odd"]), normed=list(state["normed"]), batch=state["batch"])
        if "batches" not in state:
            found.rest = None
            if any(n % found.batch for sizes in calls.values() for n in sizes.values()):
                found.batch = 1  # costs were those of a whole batch then, and a run goes on with them
            return found
        found.batches, found.rest, found.networks = state["batches"], state["rest"], dict(state["networks"])
        return found


def join(networks: dict[str, str], layer: str, network: str) -> None:
    """A layer ran in, or behind, a network. It belongs to the innermost one that holds it, else to the first one behind
    which it ran: a discriminator's are its own, also where it ran on what a generator had made first."""

    def depth(name: str) -> int:
        return len(name) if not name or layer == name or layer.startswith(f"{name}.") else -1

    if layer not in networks or depth(network) > depth(networks[layer]):
        networks[layer] = network
