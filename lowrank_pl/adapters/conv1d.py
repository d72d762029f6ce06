"""The linear layers of GPT-2."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from lowrank_pl.adapters.ordinary import OneMap
from lowrank_pl.layer_spec import LayerSpec


@final
class Conv1D(OneMap):
    """Hugging Face's `Conv1D`, a linear layer that stores its weight as `[S, T]`; known by its name, so that the
    library is not needed."""

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        weight = module._parameters.get("weight")
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf") or weight is None or weight.dim() != 2:
            return {}
        return {"": LayerSpec("linear", weight.shape[0], weight.shape[1])}

    def read(self, module: nn.Module, key: str) -> Tensor:
        (weight,) = self.parameters(module, key)
        return weight.T
