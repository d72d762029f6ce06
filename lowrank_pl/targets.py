"""Which layers take part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from lowrank_pl.adapters import LinearMap
from lowrank_pl.layers import LAYER_TYPES
from lowrank_pl.tracing import Trace

_TYPE_NAMES = (
    *(kind.__name__ for kind in LAYER_TYPES), "Conv1D", "MultiheadAttention", "LSTM", "GRU", "RNN", "Embedding"
)  # fmt: skip


@final
@dataclass(frozen=True)
class Targets:
    """Layers by shell-style patterns on the whole dotted module name, by type and by size.

    `types` holds class names such as `"Conv2d"`. `skip_first` leaves out the first convolution that runs, `skip_last`
    the last linear layer that runs, `min_channels` convolutions with fewer input channels. Where `training_step` calls
    several networks, each with data and not with what another has computed (a student and its teacher, a generator and
    a discriminator), each has a first and a last one. Embeddings take part with `embeddings`, and with them the heads
    that are tied to them. The DeepTwist paper leaves out the first convolution, and in
    VGG19 and ResNet-34 `min_channels=128`.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    types: Sequence[str] | None = None
    skip_first: bool = True
    skip_last: bool = True
    min_channels: int = 0
    embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            value = getattr(self, name)
            if value is None and name == "types":
                continue
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"Expected argument `{name}` to be a list of strings but got {value!r}")
            if not value and name != "exclude":
                raise ValueError(f"Expected argument `{name}` to hold a name or a pattern such as '*' but got none")
            object.__setattr__(self, name, tuple(value))
        unknown = sorted(set(self.types or ()) - set(_TYPE_NAMES))
        if unknown:
            raise ValueError(f"Expected argument `types` to hold names from {_TYPE_NAMES} but got {unknown}")
        if self.min_channels < 0:
            raise ValueError(f"Expected argument `min_channels` to be at least 0 but got {self.min_channels}")

    def left_out(self, maps: Mapping[str, LinearMap], trace: Trace | None) -> dict[str, str]:
        """The maps that do not take part, and why. Without a trace, the order of registration stands for the order
        of running. Raises `ValueError` for a pattern that matches no layer."""
        check_patterns((*self.include, *self.exclude), maps, "targets")
        ends = self._ends(maps, trace)
        reasons = {}
        for name, each in maps.items():
            width = math.inf if each.layer.kind == "linear" else each.layer.in_channels
            if not matches(name, self.include) or matches(name, self.exclude):
                reasons[name] = "not among the targets"
            elif self.types is not None and not set(self.types) & set(each.kinds):
                reasons[name] = f"not of type {' or '.join(self.types)}"
            elif "Embedding" in each.kinds and not self.embeddings:
                reasons[name] = "an embedding: Targets(embeddings=True) takes it"
            elif name in ends:
                reasons[name] = ends[name]
            elif width < self.min_channels:
                reasons[name] = f"fewer than {self.min_channels} input channels"
        return reasons

    def _ends(self, maps: Mapping[str, LinearMap], trace: Trace | None) -> dict[str, str]:
        """The first convolution and the last linear layer of every network, in these words."""
        networks: dict[str, list[str]] = {}
        for name in trace.calls if trace else maps:
            if name in maps and maps[name].is_layer and "Embedding" not in maps[name].kinds:
                networks.setdefault(trace.networks.get(name, "") if trace else "", []).append(name)
        found: dict[str, str] = {}
        for network, names in networks.items():
            of = "" if len(networks) == 1 else f" of {network or 'the module'}"
            linears = [name for name in names if maps[name].layer.kind == "linear"]
            convolutions = [name for name in names if name not in linears]
            found |= dict.fromkeys(convolutions[:1] if self.skip_first else [], f"the first convolution{of}")
            found |= dict.fromkeys(linears[-1:] if self.skip_last else [], f"the last linear layer{of}")
        return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Iterable[str], argument: str) -> None:
    """Raise `ValueError` for a pattern that matches none of the names."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            some = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "") if known else "none at all"
            raise ValueError(
                f"Pattern {pattern!r} in `{argument}` matches no linear layer or convolution; the network has {some}. "
                "Patterns are compared with the whole dotted name: try a leading '*'."
            )
