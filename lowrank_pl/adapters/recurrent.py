"""Recurrent networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.adapters.computed import is_plain
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SplitRecurrent, matrix_names, recurrent_inputs


@final
class Recurrent(Adapter):
    """`nn.LSTM`, `nn.GRU` and `nn.RNN`: the matrices of inputs and hidden states, all gates together, one map each;
    see `RowBlocks` for a rank per gate."""

    hides_parameters = True

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, nn.RNNBase):
            return {}
        shapes = {name: module._parameters.get(name) for name in matrix_names(module)}
        return {name: LayerSpec("linear", p.shape[1], p.shape[0]) for name, p in shapes.items() if p is not None}

    def read(self, module: nn.Module, key: str) -> Tensor:
        weight: Any = module._parameters[key]
        assert isinstance(weight, Tensor)
        return weight

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        return (self.read(module, key),)

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        return module._parameters.get(key.replace("weight", "bias"))

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        assert isinstance(module, nn.RNNBase)
        return recurrent_inputs(module, args, kwargs)

    def stands_in(self, module: nn.Module, key: str) -> bool:
        return not key.startswith("weight_ih_l0")

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        assert isinstance(module, nn.RNNBase)
        if type(module) not in (nn.LSTM, nn.GRU, nn.RNN):
            return f"a {type(module).__name__}, of which nobody knows what it adds"
        return None if is_plain(module, matrix_names(module)) else "weights of its layer are parametrized"

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        assert isinstance(module, nn.RNNBase)
        return SplitRecurrent.of(module, parts)
