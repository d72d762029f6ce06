"""Weight decay on the matrices that factors make, instead of on the factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_pl.decompositions import Chain
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import LAYER_TYPES, GroupedLinear, TiledLayer, as_operator, spec_of

_STAGES = (*LAYER_TYPES, GroupedLinear)


def sum_of_squares(net: nn.Module) -> Tensor:
    """`sum ||W||^2` over all linear layers and convolutions, a scalar to differentiate; biases and norms are left out.

    W is the weight that a layer deploys as: for a chain of factors, such as `U V`, their product, and for a
    `TiledLayer` the matrix of its tiles. Half of it times a constant, added to the loss, decays that product, as the
    code of Idelbayev & Carreira-Perpinan (CVPR 2020) does where factors are trained. A `Sequential` counts as a
    chain where it holds nothing but linear layers or convolutions that make up one. Computed without autocast.
    """
    squares: list[Tensor] = []
    with torch.autocast(next(net.parameters()).device.type, enabled=False):
        _gather(net, squares)
        return torch.stack(squares).sum() if squares else torch.zeros(())


def _gather(module: nn.Module, squares: list[Tensor]) -> None:
    if isinstance(module, TiledLayer):
        squares.append(module.dense_weight().square().sum())
    elif isinstance(module, _STAGES):
        squares.append(module.weight.square().sum())  # type: ignore[operator]
    elif isinstance(module, nn.Sequential) and _are_factors(list(module)):
        squares.append(_squares_of_product(list(module)))
    else:
        for child in module.children():
            _gather(child, squares)


def _are_factors(stages: list[nn.Module]) -> bool:
    """Whether these make up one linear layer: no bias before the end, every axis of the kernel in one stage."""
    if not stages or not all(isinstance(stage, _STAGES) for stage in stages):
        return False
    kernels = [_spec(stage).kernel for stage in stages]
    if any(stage.bias is not None for stage in stages[:-1]) or len({len(kernel) for kernel in kernels}) > 1:
        return False
    return all(sum(size > 1 for size in sizes) <= 1 for sizes in zip(*kernels, strict=True))


def _squares_of_product(stages: list[nn.Module]) -> Tensor:
    specs = [_spec(stage) for stage in stages]
    if len(specs) == 2 and specs[0].groups == specs[1].groups == 1 and set(specs[1].kernel) <= {1}:
        first, second = (_operator(stage, spec).flatten(1) for stage, spec in zip(stages, specs, strict=True))
        return ((first @ first.mT) * (second.mT @ second)).sum()  # ||U V||^2 from two small matrices
    operators = tuple(_operator(stage, spec) for stage, spec in zip(stages, specs, strict=True))
    # as a plain convolution's: a transposed one's numbers are the same in another order
    layer = specs[0].with_(kind="linear" if specs[0].kind == "linear" else "conv")
    return Chain(layer, (), tuple(specs), operators).reconstruct().square().sum()


def _spec(stage: nn.Module) -> LayerSpec:
    if isinstance(stage, GroupedLinear):
        return LayerSpec("linear", stage.in_features, stage.out_features, groups=stage.groups)
    return spec_of(stage)


def _operator(stage: nn.Module, spec: LayerSpec) -> Tensor:
    weight = stage.weight
    assert isinstance(weight, Tensor)
    return as_operator(weight, spec)
