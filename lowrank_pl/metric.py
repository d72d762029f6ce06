"""In which sense a structure is near to a layer's weight: Frobenius, or by what the layer is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator, as_stored, places_of
from lowrank_pl.linalg import Root, product_dtype


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """`||B^(1/2) (Theta - M) A^(1/2)||_F^2` for weights Theta and M of one layer, summed up over its groups.

    `inputs` is the root of `A = E[x x^T]`, `[groups, columns, columns]`, of what the layer's matrices are applied to:
    patches `[S / groups, *kernel]` of a convolution's input, vectors `[S / groups]` of a linear layer's and of a
    transposed convolution's, whose matrices give patches of the output. `outputs` is that of `B = E[g g^T]`,
    `[groups, T / groups, T / groups]`, of the gradients at its outputs. None stands for 1. `sweeps` says how often
    all factors of a structure without a closed form are refitted in turn.
    """

    layer: LayerSpec
    inputs: Root | None = None
    outputs: Root | None = None
    sweeps: int = 0
    # B and A as `times` has used them, by type and device
    _matrices: dict[tuple[torch.dtype, torch.device], list[Tensor | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        layer = self.layer.with_(inputs=(), share=1.0)
        for name, root, size in (("inputs", self.inputs, columns_of(layer)), ("outputs", self.outputs, self._rows)):
            if root is None:
                continue
            shape = root.factor.shape[: -1 if root.is_diagonal else -2]
            if (*shape, root.size) != (layer.groups, size):
                raise ValueError(
                    f"Expected `{name}` to be the root of moments {[layer.groups, size, size]}: groups of the layer, "
                    f"then what its matrices are applied to; but got one of {[*shape, root.size, root.size]}"
                )

    @property
    def _rows(self) -> int:
        return self.layer.out_channels // self.layer.groups

    def columns(self, *axes: int) -> Root | None:
        """The root for input channels and these kernel axes, summed up over the other axes: `[groups, S / groups *
        sizes, ...]`, in the order of `as_operator`."""
        if self.inputs is None:
            return None
        layer, sizes = self.layer, [self.layer.kernel[i] for i in axes]
        if layer.kind == "conv_transpose":  # the same at every place of the kernel
            return self.inputs.repeated(math.prod(sizes)) if sizes else self.inputs
        return self.inputs.marginal((layer.in_channels // layer.groups, *layer.kernel), [0, *(1 + i for i in axes)])

    def places(self, axis: int) -> Root | None:
        """The root for the places along one kernel axis, summed up over all else: `[groups, size, size]`; None where
        they weigh alike."""
        if self.inputs is None or self.layer.kind == "conv_transpose":
            return None
        return self.inputs.marginal((self.layer.in_channels // self.layer.groups, *self.layer.kernel), [1 + axis])

    def rows(self, places: int = 1) -> Root | None:
        """The root for output channels, each at so many places: `[groups, T / groups * places, ...]`."""
        return self.outputs if self.outputs is None or places == 1 else self.outputs.repeated(places)

    def of_channels(self, layer: LayerSpec, channels: Tensor) -> Metric:
        """That of `layer`, which is given these input channels alone, `[c]`, and is otherwise the same."""
        inputs = self.inputs
        if inputs is not None:
            index = columns_of_channels(self.layer, channels)
            inputs = inputs.to(index.device).part(index)
        return Metric(layer, inputs, self.outputs, self.sweeps)

    def whiten(self, operator: Tensor) -> Tensor:
        """`[groups, m, S / groups, *kernel]` to `[groups, m, k]`, whose products are those in A."""
        if self.inputs is None:
            return operator.flatten(2)
        inputs = self.inputs.to(operator.device)
        if self.layer.kind != "conv_transpose":
            return inputs.times(operator.flatten(2))
        places = operator.flatten(3) if self.layer.kernel else operator.unsqueeze(3)
        white = inputs.times(places.transpose(2, 3).flatten(1, 2))
        apart: Tensor = white.unflatten(1, (operator.shape[1], -1)).flatten(2)
        return apart

    def squared_norm(self, weight: Tensor) -> float:
        """The squared norm of a weight, or of a difference of two, as PyTorch stores them."""
        white = self.whiten(grouped(weight.double(), self.layer))
        if self.outputs is not None:
            white = self.outputs.to(white.device).times(white.mT)
        return float(white.square().sum())

    def times(self, weight: Tensor) -> Tensor:
        """`B W A`: half of the gradient of the squared norm, as PyTorch stores the weight."""
        wide = weight.detach().to(product_dtype(weight.dtype, weight.device))
        key = (wide.dtype, wide.device)
        if key not in self._matrices:  # kept: a penalty is asked for at every step of a training
            roots = (self.outputs, self.inputs)
            self._matrices[key] = [None if r is None else _matrix_of(r).to(wide.device, wide.dtype) for r in roots]
        b, a = self._matrices[key]
        operator = grouped(wide, self.layer)  # [groups, T / groups, S / groups, *kernel]
        product = operator.flatten(2)
        if a is not None and self.layer.kind == "conv_transpose":  # the same at every place of the kernel
            places = operator.reshape(*operator.shape[:3], -1).transpose(2, 3)
            product = _in(places, a.unsqueeze(1)).transpose(2, 3).flatten(2)
        elif a is not None:
            product = _in(product, a)
        if b is not None:
            product = _in(product.mT, b).mT
        return as_stored(product.reshape(operator.shape).flatten(0, 1), self.layer).to(weight.dtype)

    @property
    def largest(self) -> float:
        """The largest eigenvalue of its quadratic form: how stiff a penalty in this metric is."""
        return math.prod(root.largest for root in (self.inputs, self.outputs) if root is not None)

    def normalized(self, shrinkage: float) -> Metric:
        """With A and B of mean eigenvalue 1 in every group, after so much of the mean has been added to all."""
        roots = [None if root is None else root.normalized(shrinkage) for root in (self.inputs, self.outputs)]
        return Metric(self.layer, roots[0], roots[1], self.sweeps)

    def bounded(self, most: float) -> Metric:
        """With no eigenvalue of its quadratic form above `most`: the root of that for A and B, where there are both."""
        each = most**0.5 if self.inputs is not None and self.outputs is not None else most
        roots = [None if root is None else root.bounded(each) for root in (self.inputs, self.outputs)]
        return Metric(self.layer, roots[0], roots[1], self.sweeps)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {name: root and vars(root).copy() for name, root in (("inputs", self.inputs), ("outputs", self.outputs))}

    @classmethod
    def from_state_dict(cls, layer: LayerSpec, state: Mapping[str, Any], device: torch.device) -> Metric:
        """The inverse of `state_dict`. Raises `ValueError` for the moments of another layer."""
        inputs, outputs = (state[key] and Root(**state[key]).to(device) for key in ("inputs", "outputs"))
        return cls(layer, inputs, outputs)


def _matrix_of(root: Root) -> Tensor:
    """The diagonal alone of a diagonal one."""
    return root.factor.square() if root.is_diagonal else root.matrix


def _in(matrices: Tensor, a: Tensor) -> Tensor:
    """`M A`; of a diagonal A its diagonal, with an axis less."""
    return matrices * a.unsqueeze(-2) if a.dim() < matrices.dim() else matrices @ a


def grouped(weight: Tensor, layer: LayerSpec) -> Tensor:
    """A weight as `[groups, T / groups, S / groups, *kernel]`."""
    operator: Tensor = as_operator(weight, layer).unflatten(0, (layer.groups, -1))
    return operator


def columns_of(layer: LayerSpec) -> int:
    """How many inputs its matrices have, in each group."""
    of_patches = layer.kind != "conv_transpose"
    return layer.num_weights // layer.out_channels if of_patches else layer.in_channels // layer.groups


def columns_of_channels(layer: LayerSpec, channels: Tensor) -> Tensor:
    """Those of its matrices, in each group, that these input channels `[c]` are multiplied by: `[groups, columns]`."""
    width = columns_of(layer) // (layer.in_channels // layer.groups)
    places = places_of(channels, layer).unsqueeze(2) * width
    columns: Tensor = (places + torch.arange(width, device=channels.device)).flatten(1)
    return columns


def lowered_roots(metric: Metric) -> tuple[Root | None, Root | None]:
    """Of the rows and of the columns of `lowered(weight, layer)`."""
    axes, transposed = range(len(metric.layer.kernel)), metric.layer.kind == "conv_transpose"
    rows = metric.rows(math.prod(metric.layer.kernel) if transposed else 1)
    return rows, metric.columns() if transposed else metric.columns(*axes)
