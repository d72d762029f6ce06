"""Ordinary `torch.nn` layers to and from `LayerSpec`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.grouped_linear import GroupedLinear

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS.values(), *_TRANSPOSED.values())


def spec_of(layer: Any) -> LayerSpec:
    """The shape of an `nn.Linear`, `nn.ConvNd` or `nn.ConvTransposeNd`."""
    if isinstance(layer, nn.Linear):
        return LayerSpec("linear", layer.in_features, layer.out_features)
    padding = layer.padding
    return LayerSpec(
        kind="conv_transpose" if isinstance(layer, tuple(_TRANSPOSED.values())) else "conv",
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=(0,) * len(layer.kernel_size)
        if padding == "valid"
        else padding
        if padding == "same"
        else tuple(padding),
        dilation=tuple(layer.dilation),
        output_padding=tuple(layer.output_padding),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def build(spec: LayerSpec, bias: bool) -> nn.Module:
    """A fresh layer of that shape, with PyTorch's own initialization. The inverse of `spec_of`."""
    if spec.kind == "linear":
        if spec.groups > 1:
            return GroupedLinear(spec.in_channels, spec.out_channels, spec.groups, bias=bias)
        return nn.Linear(spec.in_channels, spec.out_channels, bias=bias)
    options = {} if spec.kind == "conv" else {"output_padding": spec.output_padding}
    classes = _CONVS if spec.kind == "conv" else _TRANSPOSED
    layer: nn.Module = classes[len(spec.kernel)](
        spec.in_channels,
        spec.out_channels,
        spec.kernel,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=spec.groups,
        bias=bias,
        padding_mode=spec.padding_mode,
        **options,
    )
    return layer


def as_operator(weight: Tensor, spec: LayerSpec) -> Tensor:
    """A weight as `[T, S / groups, *kernel]`; PyTorch stores transposed convolutions as `[S, T / groups, ...]`."""
    if spec.kind != "conv_transpose":
        return weight
    operator: Tensor = weight.unflatten(0, (spec.groups, -1)).transpose(1, 2).flatten(0, 1)
    return operator


def as_stored(operator: Tensor, spec: LayerSpec) -> Tensor:
    """The inverse of `as_operator`."""
    return as_operator(operator, spec)  # swapping two axes within each group undoes itself


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight and a bias, which learn if these do, on whatever device they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")  # draws no numbers
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def with_missing(
    projections: Mapping[str, nn.Module], dense: Mapping[str, tuple[Tensor, Tensor | None]]
) -> dict[str, nn.Module]:
    """The given modules, and for the other names of `dense` linear layers with copies of its weights and biases."""
    if unknown := projections.keys() - dense.keys():
        raise ValueError(f"Expected `projections` to name some of {sorted(dense)} but got {sorted(unknown)}")
    return {name: projections[name] if name in projections else linear_of(*each) for name, each in dense.items()}


def heard_inputs(
    module: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the submodules of these names, linear layers, are applied to in a call: `[..., in]`, or vectors `[n, in]` of
    all calls of those that are called several times."""
    heard: dict[str, list[Tensor]] = {name: [] for name in names}
    for name, found in heard.items():
        module.get_submodule(name).register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
    module(*args, **kwargs)
    return {
        name: found[0] if len(found) == 1 else torch.cat([x.reshape(-1, x.shape[-1]) for x in found])
        for name, found in heard.items()
        if found
    }
