"""Tables of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from lowrank_pl.adapters.ordinary import OneMap
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import FactoredEmbedding


@final
class Embedding(OneMap):
    """`nn.Embedding` `[V, H]`, as the linear map from H to V that a head with the same weight is.

    It is not called with vectors: as long as nothing else is known, it counts as no multiply-adds, before and after.
    """

    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        if not isinstance(module, nn.Embedding):
            return {}
        return {"": LayerSpec("linear", module.embedding_dim, module.num_embeddings)}

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        return None

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        return {}

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        assert isinstance(module, nn.Embedding)
        if type(module).forward is not nn.Embedding.forward:
            return f"a {type(module).__name__} with a forward of its own"
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return "its weight is parametrized"
        if module.max_norm is not None:
            return "an embedding with max_norm, which changes its rows when they are read"
        return "an embedding with sparse gradients" if module.sparse else None

    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        return FactoredEmbedding(parts[""], module.padding_idx)
