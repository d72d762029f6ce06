"""What deployed layers share that multiply by their factors, or by the dense weight that these make."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.dense_run import DenseRun
from lowrank_pl.layers.lazy_weight import Made, weight_of_factors

Run = Literal["factors", "dense"]


class RebuildingLayer(DenseRun):
    """A layer whose parameters are factors and perhaps a bias.

    With `run="factors"` it multiplies by them; with `run="dense"` it rebuilds the weight once and runs as the dense
    layer does: a small file at dense speed.
    """

    __jit_unused_properties__ = ("weight",)  # for torch.jit.script

    def __init__(self, spec: LayerSpec, bias: bool, run: Run) -> None:
        super().__init__()
        self.spec = spec.with_(inputs=())
        self.run: Run = run
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None

    @abstractmethod
    def multiply_vectors(self, x: Tensor) -> Tensor:
        """A linear layer by its factors, without the bias: `[..., S]` to `[..., T]`."""

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        layer = self.multiply_vectors if self.spec.kind == "linear" and self.run == "factors" else None
        return weight_of_factors(self.factors()[0], self.spec.stored_shape, Made(self._weight, layer))
