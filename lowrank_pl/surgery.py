"""The only place that changes a module tree: copy, replace."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.layers import tied
from lowrank_pl.names import clean_name


def heads_of(maps: Mapping[str, LinearMap], name: str) -> list[str]:
    """The layers that have the weight of an embedding: what is done to that is done to them."""
    weight = maps[name].parameters[0]
    if not isinstance(maps[name].module, nn.Embedding):
        return []
    return [head for head, each in maps.items() if head != name and each.parameters[0] is weight]


def deploy(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules of factors in place of the linear maps of these names; returns the model, or what replaces it."""
    maps = find_maps(model)
    by_owner: dict[nn.Module, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        by_owner.setdefault(maps[name].module, {})[maps[name].key] = part
    adapters = {each.module: each.adapter for each in maps.values()}
    copies = {
        maps[head].module: tied(part, maps[head].bias) for name, part in parts.items() for head in heads_of(maps, name)
    }
    new = copies | {owner: adapters[owner].deploy(owner, own) for owner, own in by_owner.items()}
    return replace_layers(model, {owner: module for owner, module in new.items() if module is not owner})


def detached_copy(model: nn.Module, shared: tuple[Any, ...] = ()) -> nn.Module:
    """A deep copy without what `torch.compile` wrapped around modules and methods; objects in `shared` are not
    copied. Raises what an attribute that cannot be copied raises: see `uncopyable`."""
    memo = _memo(model, shared)
    for module in model.modules():
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            memo[id(module)] = copy.deepcopy(inner, memo)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _drop_compiled_methods(module)
    return copied


def uncopyable(model: nn.Module, shared: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The attributes that no copy of the model can have, such as locks, files and generators, by their dotted names.

    Tensors are not copied to find out.
    """
    memo = _memo(model, shared)
    memo |= {id(tensor): tensor for module in model.modules() for tensor in _tensors(vars(module))}
    memo |= {id(module): module for module in model.modules()}
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # of any kind: what a class of somebody else does
                found[f"{clean_name(name)}.{attribute}".lstrip(".")] = value
    return found


def _memo(model: nn.Module, shared: tuple[Any, ...]) -> dict[int, Any]:
    """What deepcopy is to take for the copies of these objects."""
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if not tensor.is_leaf:  # a loss kept as an attribute, say, which refuses to be copied
                memo.setdefault(id(tensor), tensor.detach().clone())
    return memo


def _drop_compiled_methods(module: nn.Module) -> None:
    """Lightning sets compiled methods, closures over the original, on a module that was compiled as a whole."""
    own = vars(module)
    if own.get("_compiler_ctx") is not None:
        for key in own["_compiler_ctx"]:
            own.pop(key.removeprefix("original_"), None)
        own["_compiler_ctx"] = None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def replace_layers(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in place of old ones wherever they occur; returns the model, or what replaces it.

    A new module gets the old one's hooks and plain attributes, such as `stride`, which the model's code may read.
    """
    for old, new in replacements.items():
        _take_over(old, new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    _leave_fast_paths(model, set(replacements.values()))
    return replacements.get(model, model)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    for key, value in vars(old).items():
        if key in _HOOKS:
            vars(new)[key] = value
        elif not key.startswith("_") and key not in {**new._parameters, **new._buffers, **new._modules}:
            vars(new).setdefault(key, value)


# what PyTorch keeps about hooks on calls: see `nn.Module.__init__`
_HOOKS = frozenset(
    f"_{kind}{detail}"
    for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    for detail in ("", "_with_kwargs", "_always_called")
) | {"_is_full_backward_hook"}


def _leave_fast_paths(model: nn.Module, replaced: set[nn.Module]) -> None:
    """PyTorch's transformer encoders have, for evaluation, a way past their linear layers' forward, straight to the
    weights; by these attributes they tell when not to take it."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and replaced & set(module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def num_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def is_same_computation(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are the same modules on tensors of the same shapes, so that they take the same time."""

    def outline(model: nn.Module) -> list[Any]:
        modules = [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [modules, [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors]]

    return outline(a) == outline(b)
