"""Linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import LAYER_TYPES, spec_of


class OneMap(Adapter):
    """A module that is one linear map of its only argument, by its parameter `weight`."""

    def read(self, module: nn.Module, key: str) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (weight,)

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        bias = module.bias
        assert isinstance(bias, Tensor | None)
        return bias

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        x = args[0] if args else kwargs.get("input")
        return {"": x} if isinstance(x, Tensor) and len(args) + len(kwargs) == 1 else None

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return parts[""]


@final
class Ordinary(OneMap):
    """`nn.Linear`, `nn.ConvNd` and `nn.ConvTransposeNd` that compute as PyTorch's do."""

    shows_weight = True

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, LAYER_TYPES):
            return {}
        return {"": LayerSpec("linear", 0, 0) if isinstance(module, LazyModuleMixin) else spec_of(module)}

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        weight = module._parameters.get("weight")
        if isinstance(module, LazyModuleMixin):
            return "lazy: its shape is not known yet"
        if isinstance(weight, nn.Parameter) and weight.is_complex():
            return "its weight is complex"
        own = [*module._modules, *module._buffers, *(module._parameters.keys() - {"weight", "bias"})]
        if own:  # which whoever put them there will look for
            return f"has parts of its own: {', '.join(own)}"
        return None
