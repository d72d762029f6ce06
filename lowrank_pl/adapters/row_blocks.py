"""Parts of a matrix, each with a rank of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import StackedLinear, linear_of


@final
@dataclass(frozen=True)
class RowBlocks(Adapter):
    """The maps of another adapter, some of them cut into so many blocks of outputs: heads of attention, gates of a
    recurrent network. `blocks` maps patterns of keys to numbers; what no pattern matches stays whole.

        register_adapter(RowBlocks(Attention(), {"[qkv]_proj": 8}))  # a rank per head
        register_adapter(RowBlocks(Recurrent(), {"weight_?h_*": 4}))  # a rank per gate of an LSTM
    """

    adapter: Adapter
    blocks: Mapping[str, int]

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, Adapter):
            raise TypeError(f"Expected argument `adapter` to be an Adapter but got {self.adapter!r}")
        if not all(type(n) is int and n > 0 for n in self.blocks.values()):
            raise ValueError(f"Expected argument `blocks` to hold numbers of blocks but got {self.blocks}")

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        found: dict[str, LayerSpec] = {}
        for key, layer in self.adapter.maps(module).items():
            count = self._count(key)
            if layer.kind != "linear" or layer.groups > 1 or layer.out_channels % count:
                raise ValueError(
                    f"Expected argument `blocks` to cut linear maps into equal parts, but {key!r} of "
                    f"{type(module).__name__} has {layer.out_channels} outputs, which {count} does not divide"
                )
            part = layer.with_(out_channels=layer.out_channels // count)
            found |= {key: layer} if count == 1 else {f"{key}.{i}": part for i in range(count)}
        return found

    def read(self, module: nn.Module, key: str) -> Tensor:
        return self._part(key, self.adapter.read(module, self._whole(key)))

    def write_(self, module: nn.Module, key: str, weight: Tensor) -> None:
        whole = self.adapter.read(module, self._whole(key)).clone()
        self._part(key, whole).copy_(weight)
        self.adapter.write_(module, self._whole(key), whole)

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        return self.adapter.parameters(module, self._whole(key))

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        bias = self.adapter.bias(module, self._whole(key))
        return None if bias is None else self._part(key, bias)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        whole = self.adapter.inputs(module, args, kwargs)
        return None if whole is None else {key: whole[self._whole(key)] for key in self.maps(module)}

    def stands_in(self, module: nn.Module, key: str) -> bool:
        return self.adapter.stands_in(module, self._whole(key))

    def inside(self, module: nn.Module) -> Sequence[nn.Module]:
        return self.adapter.inside(module)

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        return self.adapter.obstacle(module, self._whole(key))

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        whole: dict[str, nn.Module] = {}
        for key in dict.fromkeys(map(self._whole, parts)):
            own = [key] if self._count(key) == 1 else [f"{key}.{i}" for i in range(self._count(key))]
            layers = [parts.get(k) or linear_of(self.read(module, k), self.bias(module, k)) for k in own]
            whole[key] = layers[0] if len(layers) == 1 else StackedLinear(layers)
        return self.adapter.deploy(module, whole)

    def _count(self, key: str) -> int:
        return next((n for pattern, n in self.blocks.items() if fnmatchcase(key, pattern)), 1)

    def _whole(self, key: str) -> str:
        start, _, number = key.rpartition(".")
        return start if number.isdigit() and self._count(start) > 1 else key

    def _part(self, key: str, whole: Tensor) -> Tensor:
        start = self._whole(key)
        if start == key:
            return whole
        parts: Sequence[Tensor] = torch.chunk(whole, self._count(start))
        return parts[int(key.rpartition(".")[2])]
