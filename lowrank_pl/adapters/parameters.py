"""Matrices that a module multiplies by in its own code: experts, routers, heads without a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import FactoredExperts, FactoredParameter, linear_of

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@final
class Parameters(Adapter):
    """Every parameter `[..., T, S]` of a module that is no layer: one linear map, or, where it has more than two axes,
    a batch of them, which share a rank. It takes part if all that a run shows is products with it."""

    shown_by_running = True
    shows_weight = True

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if isinstance(module, _NORMS):
            return {}
        found = {}
        for name, p in module._parameters.items():
            if p is None or isinstance(p, nn.UninitializedParameter) or sum(n > 1 for n in p.shape) < 2:
                continue  # a vector
            groups, (rows, columns) = math.prod(p.shape[:-2]), p.shape[-2:]
            found[name] = LayerSpec("linear", groups * columns, groups * rows, groups=groups)
        return found

    def read(self, module: nn.Module, key: str) -> Tensor:
        parameter: Any = module._parameters[key]
        weight: Tensor = parameter.reshape(-1, parameter.shape[-1])
        return weight

    def write_(self, module: nn.Module, key: str, weight: Tensor) -> None:
        parameter: Any = module._parameters[key]
        parameter.copy_(weight.reshape(parameter.shape))

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        parameter: Any = module._parameters[key]
        return (parameter,)

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        parameter: Any = module._parameters[key]
        if parameter.is_complex():
            return f"a complex parameter of {type(module).__name__}"
        return None if parameter.is_floating_point() else "not of floating-point numbers"

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        for key, part in parts.items():
            parameter: Any = module._parameters.pop(key)
            module._modules[key] = FactoredParameter(part, tuple(parameter.shape))
        return module


@final
@dataclass(frozen=True)
class Experts(Adapter):
    """The parameters `[experts, T, S]` of the modules of one class, every expert a linear map with a rank of its own,
    where `Parameters` gives all experts one.

    What is deployed computes with the factors where the module's code takes experts one by one (in Hugging Face's
    networks, `experts_implementation="eager"`), and is made whole for products with all of them at once.

        register_adapter(Experts(MixtralExperts))
    """

    kind: type[nn.Module]
    shown_by_running = True
    shows_weight = True

    def __post_init__(self) -> None:
        _check_kind(self.kind)

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, self.kind):
            return {}
        batches = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
        return {
            f"{name}.{i}": LayerSpec("linear", p.shape[2], p.shape[1])
            for name, p in batches.items()
            for i in range(p.shape[0])
        }

    def read(self, module: nn.Module, key: str) -> Tensor:
        name, _, i = key.rpartition(".")
        parameter: Any = module._parameters[name]
        weight: Tensor = parameter[int(i)]
        return weight

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        parameter: Any = module._parameters[key.rpartition(".")[0]]
        return (parameter,)

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        for name in dict.fromkeys(key.rpartition(".")[0] for key in parts):
            parameter: Any = module._parameters.pop(name)
            layers = [parts.get(f"{name}.{i}") or linear_of(weight, None) for i, weight in enumerate(parameter)]
            module._modules[name] = FactoredExperts(layers)
        return module


@final
@dataclass(frozen=True)
class ReshapedParameters(Adapter):
    """Parameters of the modules of one class, each as one matrix: its first axes, as many as `rows` says, by the
    others. For code that uses them otherwise than in plain products, in `einsum` say, of which only the author knows
    which axes are inputs and which are outputs. Complex ones are matrices of real and imaginary parts side by side.

    They are made whole where they are read: what is stored becomes less, multiply-adds do not.

        register_adapter(ReshapedParameters(XLNetRelativeAttention, {"q": 1, "k": 1, "v": 1, "o": 1}))
    """

    kind: type[nn.Module]
    rows: Mapping[str, int]

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        if not all(type(n) is int and n > 0 for n in self.rows.values()):
            raise ValueError(
                f"Expected argument `rows` to hold numbers of leading axes, from 1 on, but got {self.rows}"
            )

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, self.kind):
            return {}
        found = {}
        for name in self.rows:
            if name not in module._parameters:
                raise ValueError(
                    f"Expected argument `rows` to name parameters of {self.kind.__name__} but got {name!r}"
                )
            rows, columns = self.read(module, name).shape
            found[name] = LayerSpec("linear", columns, rows)
        return found

    def read(self, module: nn.Module, key: str) -> Tensor:
        parameter: Any = module._parameters[key]
        real: Tensor = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        return real.reshape(math.prod(real.shape[: self.rows[key]]), -1)

    def write_(self, module: nn.Module, key: str, weight: Tensor) -> None:
        parameter: Any = module._parameters[key]
        real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        real.copy_(weight.reshape(real.shape))

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        parameter: Any = module._parameters[key]
        return (parameter,)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        return {}  # nobody but its code knows

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        for key, part in parts.items():
            parameter: Any = module._parameters.pop(key)
            shape = tuple(parameter.shape)
            module._modules[key] = FactoredParameter(part, shape, whole=True, is_complex=parameter.is_complex())
        return module


def _check_kind(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"Expected argument `kind` to be a class of modules but got {kind!r}")
