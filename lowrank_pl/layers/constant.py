"""The layer at rank 0."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec


@final
class ConstantLayer(nn.Module):
    """A layer whose weight is zero: the bias (0 without one) at the shape of the output, without multiplying.

    Takes and gives the shapes of the layer that it replaces.
    """

    def __init__(self, layer: LayerSpec, bias: bool) -> None:
        super().__init__()
        self.layer = layer.with_(inputs=())
        self.bias = nn.Parameter(torch.zeros(layer.out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.layer.kernel)
        seen = self.layer.with_(inputs=((1, *x.shape[x.dim() - axes :]),))
        sizes = seen.outputs[0][1:] if axes else ()
        value = x.new_zeros(self.layer.out_channels) if self.bias is None else self.bias
        shape = (*x.shape[: x.dim() - axes - 1], self.layer.out_channels, *sizes)
        # memory of its own: what follows may write to it in place
        return value.view(-1, *[1] * axes).expand(shape).clone(memory_format=torch.contiguous_format)

    @property
    def weight(self) -> Tensor:
        """Zeros, without memory of their own."""
        like = torch.zeros(()) if self.bias is None else self.bias.detach()
        return like.new_zeros(()).expand(self.layer.stored_shape)

    def extra_repr(self) -> str:
        return f"{self.layer.in_channels}, {self.layer.out_channels}, kernel={self.layer.kernel}"
