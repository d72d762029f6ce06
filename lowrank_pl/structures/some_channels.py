"""A structure of some of the input channels; the others are not looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SomeChannelsLayer, as_stored, spread, widened
from lowrank_pl.linalg import regress
from lowrank_pl.metric import Metric, grouped
from lowrank_pl.structures.base import Layout


@final
@dataclass(frozen=True)
class SomeChannels(Layout):
    """A layout of the layer with fewer input channels: its tensors, and then the numbers of these channels, `[c]`,
    int32, ascending, as many in each group."""

    layer: LayerSpec
    inner: Layout

    @property
    def count(self) -> int:
        """How many channels, c."""
        return self.inner.layer.in_channels

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        return self.inner.stages

    @property
    def macs(self) -> int | None:
        return self.inner.macs

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (*self.inner.shapes(), (self.count,))

    @property
    def num_weights(self) -> int:
        return self.inner.num_weights

    @property
    def index_bytes(self) -> int:
        return 4 * self.count + self.inner.index_bytes

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        *own, channels = tensors
        return spread(self.inner.weight(own), self.layer, channels)

    def forms(self) -> tuple[Layout, ...]:
        return tuple(SomeChannels(self.layer, form) for form in self.inner.forms())

    def build(self, bias: bool) -> nn.Module:
        return SomeChannelsLayer(self.inner.build(bias), self.count, self)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        *own, channels = tensors
        inner = self.inner.parameters(own, bias)
        return {"channels": channels, **{f"inner.{name}": value for name, value in inner.items()}}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        return *self.inner.tensors(module.get_submodule("inner")), module.get_buffer("channels")

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """To what these channels can do best for the target, in the metric of what they are given."""
        *own, channels = tensors
        inner = self.inner.layer
        columns = inner.num_weights // inner.out_channels
        eye = torch.eye(columns, dtype=torch.float64, device=target.device).view(columns, -1, *inner.kernel)
        seen = metric.whiten(widened(eye.expand(inner.groups, *eye.shape), self.layer, channels))
        best = regress(metric.whiten(grouped(target.double(), self.layer)), seen)
        stored = as_stored(best.reshape(inner.operator_shape), inner)
        return *self.inner.refit(own, stored, metric.of_channels(inner, channels)), channels

    def describe(self) -> str:
        return f"{self.inner.describe()} on {self.count} of {self.layer.in_channels}"

    @property
    def note(self) -> str:
        return self.inner.note

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "some_channels", "channels": self.count, "inner": self.inner.to_dict()}

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], layer: LayerSpec, read: Callable[[Any, LayerSpec], Layout]
    ) -> SomeChannels | None:
        """None for anything else than what `to_dict` gives, and for another such layout inside; `read` raises
        `ValueError` for an inner part that is no layout of these channels."""
        count, inner = values.get("channels"), values.get("inner")
        if values.get("kind") != "some_channels" or type(count) is not int or not isinstance(inner, dict):
            return None
        if not 0 < count <= layer.in_channels or count % layer.groups or inner.get("kind") in ("some_channels", "sum"):
            return None
        return cls(layer, read(inner, layer.with_(in_channels=count)))
