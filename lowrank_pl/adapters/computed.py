"""Layers that compute with another weight than they hold: parametrized, normalized or standardized ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from lowrank_pl.adapters.ordinary import OneMap
from lowrank_pl.fingerprints import fingerprints
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import LAYER_TYPES, spec_of

_TRANSPOSED: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CONVS: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORWARDS = {kind.forward for kind in LAYER_TYPES}
_OLD_STYLE = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
LEAST = 1e-3  # of the weight's norm: what writing what was read may change


def is_computed(layer: nn.Module) -> bool:
    """Whether a linear layer or convolution may compute with another weight than its parameter."""
    return type(layer).forward not in _FORWARDS or not isinstance(layer._parameters.get("weight"), nn.Parameter)


def is_plain(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module computes with these parameters as they are: none is normalized, pruned or parametrized."""
    hooks = any(isinstance(hook, _OLD_STYLE) for hook in module._forward_pre_hooks.values())
    return not hooks and all(isinstance(module._parameters.get(name), nn.Parameter) for name in names)


@final
class Computed(OneMap):
    """Layers whose weight is a function of their parameters: `torch.nn.utils.parametrizations`, the older `weight_norm`
    and `spectral_norm`, weight-standardized convolutions, and others whose forward is `conv(x, f(weight))`.

    The weight is what the layer's own forward gives to PyTorch; extraction folds it. Where a projection cannot be
    reached exactly by parameters (a standardized weight has rows of mean 0, its tiles of low rank do not), the layer
    computes with the projection itself in evaluation mode, until somebody writes to its parameters.
    """

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        return {"": spec_of(module)} if isinstance(module, LAYER_TYPES) and is_computed(module) else {}

    def read(self, module: nn.Module, key: str) -> Tensor:
        held = _held(module)
        if held is not None and not torch.is_grad_enabled() and held.counts(module):
            return held.weight
        weight: Tensor = _watch(module)["weight"]
        return weight

    @torch.no_grad()
    def write_(self, module: nn.Module, key: str, weight: Tensor) -> None:
        _drop(module, _Held)
        _write(module, weight, _watch(module)["weight"])
        used = _watch(module)["weight"]
        if torch.linalg.vector_norm(used - weight) > 1e-6 * torch.linalg.vector_norm(weight):
            module.register_forward_hook(_Held(weight.clone(), _own(module)))

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        return tuple(_own(module))

    def is_exact(self, module: nn.Module, key: str) -> bool:
        held = _held(module)
        return held is None or not held.counts(module)

    def inside(self, module: nn.Module) -> Sequence[nn.Module]:
        return list(module.children())

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        if any(p.is_complex() for p in module.parameters()):
            return "its weight is complex"
        kind = type(module).__name__
        try:
            seen = _watch(module)
        except Exception:  # of any kind: a stranger's forward
            seen = {"plain": False}
        if not seen["plain"] or seen["layer"] != spec_of(module):
            return f"a {kind} with a forward of its own"
        matrices = [p for p in _own(module) if sum(n > 1 for n in p.shape) > 1]
        if len(matrices) > 1 and not parametrize.is_parametrized(module, "weight"):
            return f"its weight is computed by {kind} from {len(matrices)} matrices: register an adapter"
        return _no_way_back(module, seen["weight"].detach().clone())

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        _drop(module, (_Held, *_OLD_STYLE))
        vars(module).pop("weight", None)
        return parts[""]


class _Held:
    """A forward hook: the layer with this weight, in evaluation mode, as long as its parameters are what they were."""

    def __init__(self, weight: Tensor, parameters: list[Tensor]) -> None:
        self.weight, self.seen = weight, fingerprints(parameters)

    def counts(self, module: Any) -> bool:
        return fingerprints(_own(module)) == self.seen

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Any:
        if module.training or not self.counts(module):
            return None
        x, weight = args[0].to(output.dtype), self.weight.to(output.dtype)
        if torch.is_grad_enabled():  # the gradient is that by the weight that the parameters make
            used = _watch(module)["weight"].to(output.dtype)
            weight = used + (weight - used).detach()
        bias = None if module.bias is None else module.bias.to(output.dtype)
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        if not module.transposed:
            return module._conv_forward(x, weight, bias)
        geometry = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
        return _TRANSPOSED[weight.dim() - 2](x, weight, bias, *geometry)


def release_(model: nn.Module) -> None:
    """Let all layers compute by themselves, at their own cost."""
    for module in model.modules():
        _drop(module, _Held)


def _held(module: nn.Module) -> _Held | None:
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, _Held)), None)


def _drop(module: nn.Module, kinds: Any) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[number]


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters that make the weight."""
    return [p for name, p in module.named_parameters() if name != "bias"]


def _write(module: Any, weight: Tensor, used: Tensor) -> None:
    """Set the parameters so that they make this weight, or one that is near; now they make the one that is `used`."""
    if parametrize.is_parametrized(module, "weight"):
        listed: Any = module.parametrizations["weight"]
        value: Any = weight
        for parametrization in reversed(list(listed)):
            value = parametrization.right_inverse(value)
            if isinstance(parametrization, _WeightNorm):
                value = (value[0], _directions(weight, value[0], listed.original1))
        if isinstance(value, Tensor):
            listed.original.copy_(value)
        else:
            for i, each in enumerate(value):
                getattr(listed, f"original{i}").copy_(each)
        return
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            module.weight_g.copy_(torch.norm_except_dim(weight, 2, hook.dim))
            module.weight_v.copy_(_directions(weight, module.weight_g, module.weight_v))
            return
    held = module.weight_orig if "weight_orig" in module._parameters else module.weight
    # as it is, or of its size now, whichever comes nearer: what is standardized loses its scale (but for a small
    # constant), others multiply by a number
    scale = torch.linalg.vector_norm(held) / torch.linalg.vector_norm(used).clamp(min=torch.finfo(used.dtype).tiny)
    errors = []
    for values in (weight * scale, weight.clone()):
        held.copy_(values)
        errors.append(torch.linalg.vector_norm(_watch(module)["weight"] - weight))
    if errors[0] < errors[1]:
        held.copy_(weight * scale)


def _no_way_back(module: nn.Module, weight: Tensor) -> str | None:
    """Why the parameters cannot be set to make a weight, here the one that they make; they are left as they were."""
    saved = [(p, p.detach().clone()) for p in _own(module)]
    buffers = [(part, name, b, b.clone()) for part in module.modules() for name, b in part.named_buffers(recurse=False)]
    try:
        with torch.no_grad():
            _write(module, weight, weight)
            error = torch.linalg.vector_norm(_watch(module)["weight"] - weight)
        changed = any(not torch.equal(part._buffers[name], value) for part, name, _, value in buffers)  # type: ignore[arg-type]
    except Exception:  # a parametrization without `right_inverse`, say
        return "its weight is parametrized, without a way back (right_inverse)"
    finally:
        for p, value in saved:
            p.detach().copy_(value)
        for part, name, buffer, value in buffers:
            part._buffers[name] = buffer.copy_(value)
    if changed:
        return "its parametrization keeps something else than parameters, which writing changes"
    if not error <= LEAST * torch.linalg.vector_norm(weight):
        return f"its weight is computed by {type(module).__name__}, and what is written is not what is read"
    return None


def _directions(weight: Tensor, norms: Tensor, before: Tensor) -> Tensor:
    """Of a weight's rows; what is zero keeps the direction that it had, where 0 / 0 would be none."""
    return torch.where(norms == 0, before, weight)


class _Watch(TorchFunctionMode):
    """Notes the one linear operation that a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear or func in _CONVS.values() or func in _TRANSPOSED.values():
            self.calls.append((func, args, kwargs or {}, out))
        return out


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _watch(module: nn.Module) -> dict[str, Any]:
    """The weight that the layer's own forward gives to PyTorch, what for, and whether it does nothing else."""
    spec, device = spec_of(module), next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    axes = [d * (k - 1) + 1 for k, d in zip(spec.kernel, spec.dilation, strict=True)]
    x = torch.ones((1, spec.in_channels, *axes) if axes else (1, spec.in_channels), device=device, dtype=dtype)
    with _evaluating(module), torch.autocast(device.type, enabled=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _OLD_STYLE):
                hook(module, (x,))
        with _Watch() as watch:
            out = module.forward(x)
    if len(watch.calls) != 1:
        raise ValueError(f"Expected one linear operation but got {len(watch.calls)}")
    func, args, kwargs, value = watch.calls[0]
    names = ["x", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if func in _TRANSPOSED.values():
        names = ["x", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    given = {"bias": None, **dict(zip(("input", *names[1:]), args, strict=False)), **kwargs}
    called = spec
    if spec.kind != "linear" and spec.padding_mode == "zeros":
        called = spec.with_(**{
            name: value if isinstance(value, (str, int)) else tuple(value)
            for name, value in given.items() if name in names[3:]
        })  # fmt: skip
    plain = out is value and (given["input"] is x or spec.padding_mode != "zeros") and given["bias"] is module.bias
    right = (
        func is F.linear
        if spec.kind == "linear"
        else func in (_TRANSPOSED if spec.kind == "conv_transpose" else _CONVS).values()
    )
    return {"weight": given["weight"], "layer": called, "plain": plain and right}
