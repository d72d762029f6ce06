"""Ordinary layers one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, final, get_args

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import Between, FactorChain, as_operator, as_stored, build, scale_of
from lowrank_pl.linalg import regress
from lowrank_pl.metric import Metric, grouped
from lowrank_pl.structures.base import Layout, total_macs


@final
@dataclass(frozen=True)
class Chain(Layout):
    """Its links are ordinary layers; its tensors are their weights as operators `[T, S / groups, *kernel]`.

    `between` the links of a convolution may stand batch norms, while it is trained from scratch, or the biases that
    these have become.
    """

    layer: LayerSpec
    links: tuple[LayerSpec, ...]
    between: Between | None = None

    @property
    def stages(self) -> tuple[LayerSpec, ...]:
        return self.links

    @property
    def macs(self) -> int | None:
        return total_macs(self.stages)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(stage.operator_shape for stage in self.stages)

    def weight(self, tensors: Sequence[Tensor]) -> Tensor:
        operator, groups = tensors[0], self.stages[0].groups
        for stage, following in zip(self.stages[1:], tensors[1:], strict=True):
            operator, groups = _compose(operator, groups, following, stage.groups)
        return as_stored(operator, self.layer)

    def build(self, bias: bool) -> nn.Module:
        *inner, last = self.stages
        return FactorChain([*(build(stage, self.between == "biases") for stage in inner), build(last, bias)], self)

    def parameters(self, tensors: Sequence[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        stored = map(as_stored, tensors, self.stages)
        weights = {f"{i}.weight": tensor for i, tensor in enumerate(stored)}
        return {**weights, **({} if bias is None else {f"{len(self.stages) - 1}.bias": bias})}

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...]:
        weights = (module.get_parameter(f"{i}.weight") for i in range(len(self.stages)))
        operators = list(map(as_operator, weights, self.stages))
        if self.between == "norms":
            assert isinstance(module, FactorChain)
            for i, norm in enumerate(module.norms):
                operators[i] = (operators[i].flatten(1) * scale_of(norm).unsqueeze(1)).view_as(operators[i])
        return tuple(operators)

    def products(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(len(self.stages))),)

    def with_between(self, between: Between | None) -> Chain:
        """The same links with something else between them."""
        return replace(self, between=between)

    def refit(self, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
        """In closed form where the outputs weigh alike, or are those of one group."""
        last, stage = tensors[-1], self.links[-1]
        features = last[0].numel()
        eye = torch.eye(features, dtype=last.dtype, device=last.device).unflatten(1, last.shape[1:])
        units = eye.repeat(stage.groups, *[1] * (eye.dim() - 1))  # with which the chain gives what its last link sees
        seen, groups = tensors[0], self.links[0].groups
        for link, following in zip(self.links[1:], [*tensors[1:-1], units], strict=True):
            seen, groups = _compose(seen, groups, following, link.groups)
        white = metric.whiten(seen.unflatten(0, (self.layer.groups, -1)))
        return *tensors[:-1], regress(metric.whiten(grouped(target, self.layer)), white).reshape(last.shape)

    def describe(self) -> str:
        return " > ".join(map(_in_words, self.stages))

    def to_dict(self) -> dict[str, Any]:
        between = {} if self.between is None else {"between": self.between}
        return {"kind": "chain", "stages": [stage.to_dict() for stage in self.stages], **between}

    @classmethod
    def from_dict(cls, values: dict[str, Any], layer: LayerSpec) -> Chain | None:
        """None where the stages do not lead from the layer's inputs to its outputs. Raises `ValueError` for a stage
        that is no layer."""
        stored, between = values.get("stages"), values.get("between")
        if values.get("kind") != "chain" or not isinstance(stored, list) or not stored:
            return None
        if between not in (None, *get_args(Between)) or (between is not None and layer.kind == "linear"):
            return None
        stages, inputs = [], layer.inputs
        for each in stored:
            stages.append(LayerSpec.from_dict(each).with_(inputs=inputs, share=layer.share))
            inputs = stages[-1].outputs
        fits = all(before.out_channels == after.in_channels for before, after in pairwise(stages))
        ends = (stages[0].in_channels, stages[-1].out_channels) == (layer.in_channels, layer.out_channels)
        return cls(layer, tuple(stages), between) if fits and ends else None


def _in_words(stage: LayerSpec) -> str:
    groups = f" /{stage.groups}" if stage.groups > 1 else ""
    return f"{'x'.join(map(str, stage.kernel))} {stage.out_channels}{groups}".strip()


def _compose(first: Tensor, groups: int, second: Tensor, second_groups: int) -> tuple[Tensor, int]:
    """The operator of two convolutions in a row; along each axis one of them must have size 1.

    Either both have the same groups, or one of them has one: `[R, S/g, ...]` then `[T, R, ...]`, or `[R, S, ...]` then
    `[T, R/g, ...]`, is `[T, S, ...]`.
    """
    if groups == 1:
        parts = second.unflatten(0, (second_groups, -1)), first.unflatten(0, (second_groups, -1))
        return torch.einsum("gtr...,grs...->gts...", *parts).flatten(0, 1), 1
    blocks = first.unflatten(0, (groups, -1))
    if second_groups == groups:
        combined = torch.einsum("gtr...,grs...->gts...", second.unflatten(0, (groups, -1)), blocks)
        return combined.flatten(0, 1), groups
    assert second_groups == 1
    combined = torch.einsum("tgr...,grs...->tgs...", second.unflatten(1, (groups, -1)), blocks)
    return combined.flatten(1, 2), 1
