"""A weight written as something cheaper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import ConstantLayer, Run, TiledLayer, as_stored, build, build_with
from lowrank_pl.linalg import product_dtype

Rank = tuple[int, ...]


class Structure(ABC):
    """A weight of `layer` as factors at some `rank`; counted as it will be deployed."""

    layer: LayerSpec
    rank: Rank

    @property
    @abstractmethod
    def num_weights(self) -> int:
        """Stored weights, the bias apart."""

    @property
    @abstractmethod
    def macs(self) -> int | None:
        """Multiply-adds for one input of the network; None while the layer has not been seen to run."""

    @abstractmethod
    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight that the factors make, as PyTorch stores it; in `dtype`, or in the factors' own type."""

    @abstractmethod
    def to_module(self, bias: Tensor | None) -> nn.Module:
        """The layer to deploy, on the factors' device and in their type."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Sizes without numbers, in plain types: what `module_from_dict` needs to build an empty module."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The numbers: all factors."""

    @abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor]) -> Structure:
        """The same structure with other numbers."""


@final
@dataclass(frozen=True)
class Dense(Structure):
    """A weight kept as it is, because no factorization allowed here is cheaper, not even at the chosen rank."""

    layer: LayerSpec
    rank: Rank
    weight: Tensor

    @property
    def num_weights(self) -> int:
        return self.layer.num_weights

    @property
    def macs(self) -> int | None:
        return self.layer.macs

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.to(dtype or self.weight.dtype)

    def to_module(self, bias: Tensor | None) -> nn.Module:
        raise TypeError("A dense layer keeps its own module")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "dense"}

    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Dense:
        return replace(self, weight=tensors[0])


@final
@dataclass(frozen=True)
class Constant(Structure):
    """A weight of rank 0; `like` tells its shape, type and device."""

    layer: LayerSpec
    rank: Rank
    like: Tensor

    @property
    def num_weights(self) -> int:
        return 0

    @property
    def macs(self) -> int | None:
        return 0

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros_like(self.like, dtype=dtype or self.like.dtype, requires_grad=False)

    def to_module(self, bias: Tensor | None) -> ConstantLayer:
        module = ConstantLayer(self.layer.with_(inputs=()), bias=False)
        module.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return module

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "constant"}

    def tensors(self) -> list[Tensor]:
        return []

    def with_tensors(self, tensors: Sequence[Tensor]) -> Constant:
        return self


@final
@dataclass(frozen=True)
class Chain(Structure):
    """Ordinary layers one after another: `stages` and their weights as operators `[T, S / groups, *kernel]`."""

    layer: LayerSpec
    rank: Rank
    stages: tuple[LayerSpec, ...]
    operators: tuple[Tensor, ...]

    @property
    def num_weights(self) -> int:
        return count_weights(self.stages)

    @property
    def macs(self) -> int | None:
        return count_macs(self.stages)

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.operators[0].dtype
        operators = [operator.to(product_dtype(dtype, operator.device)) for operator in self.operators]
        operator, groups = operators[0], self.stages[0].groups
        for stage, following in zip(self.stages[1:], operators[1:], strict=True):
            operator, groups = _compose(operator, groups, following, stage.groups)
        return as_stored(operator, self.layer).to(dtype)

    def to_module(self, bias: Tensor | None) -> nn.Module:
        biases = [None] * (len(self.stages) - 1) + [bias]
        return nn.Sequential(*map(build_with, self.stages, self.operators, biases))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "chain", "stages": [stage.to_dict() for stage in self.stages]}

    def tensors(self) -> list[Tensor]:
        return list(self.operators)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Chain:
        return replace(self, operators=tuple(tensors))


@final
@dataclass(frozen=True)
class Tiles(Structure):
    """A grid of low-rank tiles of the lowered matrix: the factors of `TiledLayer`, region by region."""

    layer: LayerSpec
    rank: Rank
    tile: int
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    run: Run = "dense"

    @property
    def num_weights(self) -> int:
        return sum(factor.numel() for factor in (*self.left, *self.right))

    @property
    def macs(self) -> int | None:
        """Of the factors; a module that runs dense costs what the dense layer costs."""
        if self.run == "dense":
            return self.layer.macs
        positions = self.layer.with_(inputs=self.layer.outputs, kind="linear").macs
        return None if positions is None else positions // self.layer.num_weights * self.num_weights

    def reconstruct(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.left[0].dtype
        with torch.no_grad():
            return self._fill(None).to(product_dtype(dtype, self.left[0].device)).dense_weight().to(dtype)

    def to_module(self, bias: Tensor | None) -> TiledLayer:
        return self._fill(bias)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "tiles",
            "layer": self.layer.to_dict(),
            "tile": self.tile,
            "rank": self.rank[-1],
            "run": self.run,
        }

    def tensors(self) -> list[Tensor]:
        return [*self.left, *self.right]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Tiles:
        regions = len(self.left)
        return replace(self, left=tuple(tensors[:regions]), right=tuple(tensors[regions:]))

    def _fill(self, bias: Tensor | None) -> TiledLayer:
        with torch.device("meta"):
            module = TiledLayer(self.layer, self.tile, self.rank[-1], bias is not None, self.run)
        for empty, factors in ((module.left, self.left), (module.right, self.right)):
            for i, factor in enumerate(factors):
                empty[i] = nn.Parameter(factor.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        return module


def module_from_dict(values: Any, layer: LayerSpec, bias: bool) -> nn.Module:
    """An empty module for what `Structure.to_dict` described, in place of `layer`.

    Raises `ValueError` for anything else, and for a structure that does not fit the layer.
    """
    values = values if isinstance(values, dict) else {"kind": None}
    if values == {"kind": "constant"}:
        return ConstantLayer(layer.with_(inputs=()), bias)
    if values.get("kind") == "chain" and isinstance(values.get("stages"), list) and values["stages"]:
        stages = [LayerSpec.from_dict(stage) for stage in values["stages"]]
        channels = [layer.in_channels, *(stage.out_channels for stage in stages)]
        if channels[:-1] == [stage.in_channels for stage in stages] and channels[-1] == layer.out_channels:
            last = len(stages) - 1
            return nn.Sequential(*(build(stage, bias=bias and i == last) for i, stage in enumerate(stages)))
    if values.get("kind") == "tiles" and values.get("run") in ("factors", "dense"):
        tile, rank, spec = values.get("tile"), values.get("rank"), LayerSpec.from_dict(values.get("layer"))
        fits = spec == layer.with_(inputs=()) and spec.kind != "conv_transpose" and spec.groups == 1
        if fits and type(tile) is int and type(rank) is int and 1 <= rank <= tile <= min(spec.operator_shape[:2]):
            return TiledLayer(spec, tile, rank, bias, values["run"])
    raise ValueError(
        f"Expected the structure of a chain, of tiles or of a constant for {layer} but got {values!r:.200}"
    )


def count_weights(stages: Sequence[LayerSpec]) -> int:
    """Weights of all stages."""
    return sum(stage.num_weights for stage in stages)


def count_macs(stages: Sequence[LayerSpec]) -> int | None:
    """Multiply-adds of all stages for one input of the network; None while none has been seen."""
    macs = [stage.macs for stage in stages]
    return None if None in macs else sum(n for n in macs if n is not None)


def _compose(first: Tensor, groups: int, second: Tensor, second_groups: int) -> tuple[Tensor, int]:
    """The operator of two convolutions in a row; along each axis one of them must have size 1.

    Either both have the same groups, or the second has one: `[R, S/g, ...]` then `[T, R, ...]` is `[T, S, ...]`.
    """
    blocks = first.unflatten(0, (groups, -1))
    if second_groups == groups:
        combined = torch.einsum("gtr...,grs...->gts...", second.unflatten(0, (groups, -1)), blocks)
        return combined.flatten(0, 1), groups
    assert second_groups == 1
    combined = torch.einsum("tgr...,grs...->tgs...", second.unflatten(1, (groups, -1)), blocks)
    return combined.flatten(1, 2), 1
