"""Multi-head attention whose projections are layers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layers.lazy_weight import Made, weight_of_factors
from lowrank_pl.layers.ordinary import with_missing

_INPUTS = ("query", "key", "value")


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` (Vaswani et al. 2017) with its projections as the submodules `q_proj`, `k_proj`,
    `v_proj` and `out_proj`, each from `[..., in]` to `[..., out]` and with its own bias.

    Takes and gives what `like` does, whose settings, `bias_k` and `bias_v` it copies.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    # for nn.TransformerEncoderLayer, whose fast path multiplies by the weights itself
    _qkv_same_embed_dim = False

    def __init__(
        self, like: nn.MultiheadAttention, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, out_proj: nn.Module
    ) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = like.embed_dim, like.kdim, like.vdim
        self.num_heads, self.head_dim = like.num_heads, like.head_dim
        self.dropout, self.batch_first, self.add_zero_attn = like.dropout, like.batch_first, like.add_zero_attn
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        for name in ("bias_k", "bias_v"):
            bias = getattr(like, name)
            copied = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
            self.register_parameter(name, copied)
        self.train(like.training)

    @staticmethod
    def of(attention: nn.MultiheadAttention, projections: Mapping[str, nn.Module]) -> SplitAttention:
        """With the given projections, and linear layers with copies of the attention's own weights for the others."""
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        names = ("q_proj", "k_proj", "v_proj")
        dense = dict(zip(names, zip(weights, biases, strict=True), strict=True))
        dense["out_proj"] = attention.out_proj.weight, attention.out_proj.bias
        return SplitAttention(attention, **with_missing(projections, dense))

    @property
    def in_proj_weight(self) -> Tensor | None:
        """`[3 E, E]`, made when its values are needed, for code that asks; none where keys or values are not as wide as
        queries."""
        if not self.kdim == self.vdim == self.embed_dim:
            return None
        projections: Any = (self.q_proj, self.k_proj, self.v_proj)
        weights = [projection.weight for projection in projections]
        like = next(self.q_proj.parameters(), weights[0])
        return weight_of_factors(like, (3 * self.embed_dim, self.embed_dim), Made(lambda: torch.cat(weights)))

    @property
    def in_proj_bias(self) -> Tensor | None:
        """`[3 E]`"""
        projections: Any = (self.q_proj, self.k_proj, self.v_proj)
        biases = [projection.bias for projection in projections]
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested and query is key and key is value:
            return self._forward_nested(query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Expected `attn_mask` together with `is_causal`, which only says what kind of mask it is"
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights  # else the mask says it
        mask = None if is_causal else self._mask(key_padding_mask, attn_mask, query.dtype)
        q, k, v = self._batch(self.q_proj(query)), self._batch(self.k_proj(key)), self._batch(self.v_proj(value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:  # what was added is for everybody
            mask = F.pad(mask, (0, (self.bias_k is not None) + self.add_zero_attn))
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            y, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.transpose(1, 2).flatten(2)  # [N, L, E]
        y = y.squeeze(0) if query.dim() == 2 else y if self.batch_first else y.transpose(0, 1)
        return self.out_proj(y), weights

    def _batch(self, x: Tensor) -> Tensor:
        """`[N, L, E]` from what comes in."""
        return x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """`[N or 1, heads or 1, L or 1, S]`, to be added to the scores, from `[N, S]` or `[S]` and `[L, S]` or
        `[N heads, L, S]`."""
        if padding is not None:
            padding = _additive(padding, dtype)[..., None, None, :]
        if mask is None:
            return padding
        mask = _additive(mask, dtype)
        mask = mask.expand(1, 1, -1, -1) if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        return mask if padding is None else mask + padding

    def _forward_nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of several lengths: what `nn.TransformerEncoder` makes of a padded batch where
        its first layer is on the fast path. The weights are padded."""
        padded, lengths = x.to_padded_tensor(0.0), [len(sequence) for sequence in x.unbind()]
        positions = torch.arange(padded.shape[1], device=x.device)
        padding = torch.stack([positions >= length for length in lengths])
        y, weights = self.forward(padded, padded, padded, padding, need_weights, average_attn_weights=average)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)]), weights

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """`F.scaled_dot_product_attention`, with the weights `[N, heads, L, S]`."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    scores = scores if mask is None else scores + mask.to(scores.dtype)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add; a boolean one is true where there is nothing to be seen."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def attention_inputs(
    attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What each projection is applied to, `[..., in]`, in a call of an attention; for `out_proj`, the query stands for
    the values that it has the shape of."""
    given = dict(zip(_INPUTS, args, strict=False)) | dict(kwargs)
    query, key, value = (_whole(given[name]) for name in _INPUTS)
    return {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": query}


def _whole(x: Tensor) -> Tensor:
    """Sequences of several lengths, one after another."""
    return torch.cat(list(x.unbind())) if x.is_nested else x
