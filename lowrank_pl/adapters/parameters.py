"""Matrices that a module multiplies by in its own code: experts, routers, heads without a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import FactoredParameter

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
