"""A layer that sees some of the input channels."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.lazy_weight import Made, WeightLayout, weight_of_factors
from lowrank_pl.layers.ordinary import as_operator, as_stored


@final
class SomeChannelsLayer(nn.Module):
    """`inner` on those input channels whose numbers are in the buffer `channels`, `[c]`, int32, ascending, as many in
    each group. It has the `weight` and `bias` that the layer had, for code that asks; `layout` knows how they are made.
    """

    __jit_unused_properties__ = ("bias", "weight")  # for torch.jit.script
    channels: Tensor

    def __init__(self, inner: nn.Module, count: int, layout: WeightLayout) -> None:
        super().__init__()
        self.inner, self.layout, self.axis = inner, layout, -1 - len(layout.layer.kernel)
        self.register_buffer("channels", first_channels(layout.layer, count))

    @property
    def weight(self) -> Tensor:
        """With zeros for all other channels, as the layer stored it."""
        inner: Any = self.inner.weight
        return weight_of_factors(
            inner, self.layout.layer.stored_shape, Made(lambda: self.layout.weight(self.layout.tensors(self)))
        )

    @property
    def bias(self) -> nn.Parameter | None:
        bias = self.inner.bias
        assert isinstance(bias, nn.Parameter | None)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.index_select(self.axis, self.channels))
        return y


def first_channels(layer: LayerSpec, count: int) -> Tensor:
    """The first ones of every group, `count` in all."""
    return numbered(torch.arange(count // layer.groups).expand(layer.groups, -1), layer)


def numbered(places: Tensor, layer: LayerSpec) -> Tensor:
    """Places within the groups `[groups, c / groups]` as numbers of channels `[c]`, int32."""
    starts = torch.arange(layer.groups, device=places.device).unsqueeze(1) * (layer.in_channels // layer.groups)
    return (starts + places).flatten().to(torch.int32)


def places_of(channels: Tensor, layer: LayerSpec) -> Tensor:
    """The inverse of `numbered`, int64."""
    return channels.long().view(layer.groups, -1) % (layer.in_channels // layer.groups)


def of_channels(weight: Tensor, layer: LayerSpec, channels: Tensor) -> Tensor:
    """That part of a weight which is for these input channels; both as PyTorch stores them."""
    blocks = as_operator(weight, layer).unflatten(0, (layer.groups, -1))
    part = blocks.gather(2, _index(channels, layer, blocks.shape[1])).flatten(0, 1)
    return as_stored(part, layer.with_(in_channels=len(channels)))


def spread(part: Tensor, layer: LayerSpec, channels: Tensor) -> Tensor:
    """The inverse of `of_channels`, with zeros for all other channels."""
    blocks = as_operator(part, layer.with_(in_channels=len(channels))).unflatten(0, (layer.groups, -1))
    return as_stored(widened(blocks, layer, channels).flatten(0, 1), layer)


def widened(blocks: Tensor, layer: LayerSpec, channels: Tensor) -> Tensor:
    """`[groups, m, c / groups, *kernel]` with zeros for all other channels, `[groups, m, S / groups, *kernel]`."""
    rows = blocks.shape[1]
    zeros = blocks.new_zeros(layer.groups, rows, layer.in_channels // layer.groups, *layer.kernel)
    return zeros.scatter(2, _index(channels, layer, rows), blocks)


def _index(channels: Tensor, layer: LayerSpec, rows: int) -> Tensor:
    """Places within the groups as `gather` and `scatter` take them along axis 2: `[groups, rows, c, *kernel]`."""
    places = places_of(channels, layer).view(layer.groups, 1, -1, *[1] * len(layer.kernel))
    return places.expand(layer.groups, rows, -1, *layer.kernel)
