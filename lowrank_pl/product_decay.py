"""Weight decay on the weights that factors make, instead of on the factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.extraction import RECORD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.structures import Dense, Layout, layout_from_dict


def deployed_layers(net: nn.Module) -> dict[nn.Module, Layout]:
    """Every linear layer and convolution, or what compression put in its place, and its layout."""
    found: dict[nn.Module, Layout] = {}
    for owner in net.modules():
        for name, entry in getattr(owner, RECORD, {"layers": {}})["layers"].items():
            layer = LayerSpec.from_dict(entry["replaces"])
            layout = layout_from_dict(entry["structure"], layer)
            if layout.num_weights:
                found[owner.get_submodule(name)] = layout
    layers = {each.module: each for each in find_maps(net).values() if each.is_layer}
    inside = {part for module in found for part in module.modules()}
    return found | {module: Dense(each.layer) for module, each in layers.items() if module not in inside}


def sum_of_squares(layers: Mapping[nn.Module, Layout]) -> Tensor:
    """`sum ||W||^2`, a scalar to differentiate; biases and norms are left out.

    W is the weight that a layer deploys as, where it has factors U and V their product. Half of the sum times a
    constant, added to the loss, decays that product, as the code of Idelbayev & Carreira-Perpinan (CVPR 2020) does
    where factors are trained. Computed without autocast. `layers` are those of `deployed_layers`.
    """
    squares = []
    for module, layout in layers.items():
        tensors = layout.tensors(module)
        with torch.autocast(tensors[0].device.type, enabled=False):
            squares.append(layout.weight(tensors).square().sum())
    return torch.stack(squares).sum() if squares else torch.zeros(())
