"""Counts multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _count_lstm(x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of one direction of one layer: every vector meets both matrices."""
    return 2 * x.shape[:-1].numel() * (input_weight.numel() + hidden_weight.numel())


def _count_grouped(x: Tensor, matrices: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of `grouped_mm`: every row meets one of the matrices `[groups, in, out]`."""
    return 2 * x.numel() * matrices.shape[-1]


def _count_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of attention: every query `[..., queries, d]` meets every key, then every value."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# fused operations, of which PyTorch's counter knows nothing, or (attention on CPUs, 2.14) not in every version
_count_lstm._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode: tensors, not shapes
_count_grouped._get_raw = True  # type: ignore[attr-defined]
_count_attention._get_raw = True  # type: ignore[attr-defined]
FUSED = {
    torch.ops.aten.mkldnn_rnn_layer: _count_lstm,
    torch.ops.aten._grouped_mm: _count_grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
}


class MultiplyAdds(TorchDispatchMode):
    """Counts multiply-adds as `FlopCounterMode` does, but leaves gradients and module hooks alone."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hear = hear

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FUSED:
            count: Any = FUSED[packet]
            self.hear(count(*args, **kwargs) // 2)
        elif packet in flop_registry:
            self.hear(flop_registry[packet](*args, **kwargs, out_val=out) // 2)
        return out
