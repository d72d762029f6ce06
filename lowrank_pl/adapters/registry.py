"""Which adapters there are, and what they find in a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.adapters.attention import Attention
from lowrank_pl.adapters.base import Adapter, LinearMap
from lowrank_pl.adapters.computed import Computed
from lowrank_pl.adapters.conv1d import Conv1D
from lowrank_pl.adapters.embedding import Embedding
from lowrank_pl.adapters.ordinary import Ordinary
from lowrank_pl.adapters.parameters import Parameters
from lowrank_pl.adapters.recurrent import Recurrent
from lowrank_pl.layers import DEPLOYED
from lowrank_pl.names import clean_name

_adapters: list[Adapter] = [
    Attention(), Recurrent(), Conv1D(), Computed(), Ordinary(), Embedding(), Parameters()
]  # fmt: skip
_added: list[Adapter] = []  # by users


def register_adapter(adapter: Adapter) -> None:
    """Ask this one before the others, from now on: of several that know a module the first one counts."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"Expected argument `adapter` to be an Adapter but got {adapter!r:.100}")
    _adapters.insert(0, adapter)
    _added.append(adapter)


def find_maps(model: nn.Module) -> dict[str, LinearMap]:
    """Every linear map by its dotted name, in the order of registration, those of shared modules once; without those
    of the layers that compression put there."""
    hidden: set[nn.Module] = set()
    found = {}
    for start, module in model.named_modules():
        if isinstance(module, DEPLOYED):
            hidden |= set(module.modules())
        if module in hidden:
            continue
        for adapter in _adapters:
            maps = adapter.maps(module)
            for key, layer in maps.items():
                name = ".".join(filter(None, (clean_name(start), key)))
                found[name] = LinearMap(name, adapter, module, key, layer)
            if maps:
                hidden |= {part for inside in adapter.inside(module) for part in inside.modules()}
                break
    return found


def obstacles(model: nn.Module) -> dict[str, str]:
    """The linear maps that can be neither projected nor replaced, whatever the decomposition, and why; in one pass."""
    owners = Counter(_place(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found, maps = {}, list(find_maps(model).values())
    for each in maps:
        if each.adapter in _added:
            _check(each)
        reason = each.obstacle()
        if reason is None and any(owners[_place(p)] > 1 for p in each.parameters) and not _is_table(each, maps, owners):
            reason = "its weight is tied to another module's"
        if reason is not None:
            found[each.name] = reason
    return found


def _place(p: Tensor) -> int:
    """The same for parameters that share memory."""
    known = not p.is_meta and not isinstance(p, nn.UninitializedParameter)
    return (p.data_ptr() if known else 0) or id(p)


def _check(each: LinearMap) -> None:
    """Raise `ValueError` for an adapter that does not write what it reads; the weight is left as it was."""
    kept = [*each.parameters, *each.module.buffers()]
    saved = [p.detach().clone() for p in kept]
    before = each.read().clone()
    each.write_(before)
    wrong = before.shape != each.layer.stored_shape or not torch.allclose(each.read(), before, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        for p, value in zip(kept, saved, strict=True):
            p.detach().copy_(value)
    if wrong:
        raise ValueError(
            f"Layer {each.name!r}: {type(each.adapter).__name__} reads {list(before.shape)}; expected the shape "
            f"{list(each.layer.stored_shape)} that its `maps` says, and `write_` to undo `read`"
        )


def _is_table(each: LinearMap, maps: list[LinearMap], owners: Mapping[int, int]) -> bool:
    """Whether it is an embedding, and all that it is tied to are linear layers, which are deployed together with it."""
    weight = each.parameters[0]
    heads = [other for other in maps if other is not each and any(p is weight for p in other.parameters)]
    plain = all(isinstance(other.adapter, Ordinary) and other.layer.kind == "linear" for other in heads)
    return isinstance(each.adapter, Embedding) and plain and owners[_place(weight)] == 1 + len(heads)
