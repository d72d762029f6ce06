"""Multi-head attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.adapters.base import Adapter
from lowrank_pl.adapters.computed import is_plain
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SplitAttention, attention_inputs

_PLACES = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # of the thirds of `in_proj_weight`


@final
class Attention(Adapter):
    """`nn.MultiheadAttention`: the projections of queries, keys and values, packed or not, and that of the outputs, one
    map each; see `RowBlocks` for a rank per head."""

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, nn.MultiheadAttention):
            return {}
        e = module.embed_dim
        sizes = {"q_proj": e, "k_proj": module.kdim, "v_proj": module.vdim, "out_proj": e}
        return {key: LayerSpec("linear", size, e) for key, size in sizes.items()}

    def read(self, module: nn.Module, key: str) -> Tensor:
        (parameter,) = self.parameters(module, key)
        if key not in _PLACES or not module._qkv_same_embed_dim:
            return parameter
        weight: Tensor = parameter.chunk(3)[_PLACES[key]]
        return weight

    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        own: Any = module
        if key == "out_proj":
            return (own.out_proj.weight,)
        return (own.in_proj_weight if own._qkv_same_embed_dim else getattr(own, f"{key}_weight"),)

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        own: Any = module
        if key == "out_proj":
            bias: Tensor | None = own.out_proj.bias
            return bias
        return None if own.in_proj_bias is None else own.in_proj_bias.chunk(3)[_PLACES[key]]

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        assert isinstance(module, nn.MultiheadAttention)
        return attention_inputs(module, args, kwargs)

    def stands_in(self, module: nn.Module, key: str) -> bool:
        return key == "out_proj"

    def inside(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, nn.MultiheadAttention)
        return (module.out_proj,)

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        if type(module) is not nn.MultiheadAttention:
            return f"a {type(module).__name__}, of which nobody knows what it adds"
        own: Any = module
        names = ["in_proj_weight"] if own._qkv_same_embed_dim else [f"{name}_weight" for name in _PLACES]
        plain = is_plain(module, names) and is_plain(own.out_proj, ["weight"])
        return None if plain else "weights of its attention are parametrized"

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        assert isinstance(module, nn.MultiheadAttention)
        return SplitAttention.of(module, parts)
