"""What deployed layers share that multiply by their factors, or by the dense weight that these make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.lazy_weight import Made, weight_of_factors

Run = Literal["factors", "dense"]
Self = TypeVar("Self", bound="RebuildingLayer")


class RebuildingLayer(nn.Module, ABC):
    """A layer whose parameters are factors and perhaps a bias.

    With `run="factors"` it multiplies by them; with `run="dense"` it rebuilds the weight once, when first used, and
    runs as the dense layer does: a small file at dense speed. Rebuilt whenever a factor has changed.
    """

    __jit_unused_properties__ = ("weight",)  # for torch.jit.script

    def __init__(self, spec: LayerSpec, bias: bool, run: Run) -> None:
        super().__init__()
        self.spec = spec.with_(inputs=())
        self.run: Run = run
        self.bias = nn.Parameter(torch.zeros(spec.out_channels)) if bias else None
        self._dense: tuple[Any, Tensor] | None = None

    @abstractmethod
    def factors(self) -> list[Tensor]:
        """What the weight is made of."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight that the factors make, as PyTorch stores it."""

    @abstractmethod
    def multiply_vectors(self, x: Tensor) -> Tensor:
        """A linear layer by its factors, without the bias: `[..., S]` to `[..., T]`."""

    @property
    def weight(self) -> Tensor:
        """`dense_weight`, made when its values are needed, for code that asks for its type or shape."""
        layer = self.multiply_vectors if self.spec.kind == "linear" and self.run == "factors" else None
        return weight_of_factors(self.factors()[0], self.spec.stored_shape, Made(self._weight, layer))

    def _weight(self) -> Tensor:
        factors = self.factors()
        wants_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        if wants_grad or is_traced() or factors[0].is_inference():  # the last ones are without versions
            return self.dense_weight()
        key = [(factor.data_ptr(), factor._version) for factor in factors]
        if self._dense is None or self._dense[0] != key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(factors[0].device.type, enabled=False),
            ):
                self._dense = key, self.dense_weight()
        return self._dense[1]

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None}  # copies and pickles carry the factors only


def is_traced() -> bool:
    """Whether what runs now is being written down, to run again elsewhere."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
