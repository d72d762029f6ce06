"""What a layer's matrices are applied to: patches of a convolution's input, vectors of the others'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec


def lowered(weight: Tensor, spec: LayerSpec) -> Tensor:
    """The matrices `[groups, rows, columns]` that patches of the input are multiplied by, `T x (S d d)` in each group;
    for transposed convolutions those that give patches of the output, `(T d d) x S`."""
    matrices: Tensor = weight.unflatten(0, (spec.groups, -1)).flatten(2)
    return matrices.mT if spec.kind == "conv_transpose" else matrices


def raised(matrices: Tensor, spec: LayerSpec) -> Tensor:
    """The inverse of `lowered`: the weight as PyTorch stores it."""
    return (matrices.mT if spec.kind == "conv_transpose" else matrices).reshape(spec.stored_shape)


def lowered_inputs(x: Tensor, spec: LayerSpec, places: int | None, generator: torch.Generator) -> Tensor:
    """Rows `[groups, n, columns]` of a layer's input, as `Metric.inputs` has them: per image (or sequence) at most so
    many places, drawn anew for every call, the same in all images of it; None for all of them."""
    if spec.kind == "linear":
        return _drawn(x, spec.in_channels, places, generator)
    axes = len(spec.kernel)
    x = x.unsqueeze(0) if x.dim() == axes + 1 else x
    if spec.kind == "conv_transpose":
        return _places_of(x, spec.groups, places, generator)
    ((_, *sizes),) = spec.with_(inputs=((1, *x.shape[2:]),)).outputs
    chosen = torch.unravel_index(_draw(math.prod(sizes), places, generator), tuple(sizes))
    reached = []
    for i, places_along in enumerate(chosen):
        along = places_along[:, None] * spec.stride[i] + torch.arange(spec.kernel[i]) * spec.dilation[i]
        reached.append(along.view(len(along), *(-1 if j == i else 1 for j in range(axes))))
    index = _padded_numbers(spec, x.shape[2:])[tuple(reached)].flatten().to(x.device)  # places, each with its kernel
    vectors = x.flatten(2).mT.contiguous().index_select(1, index.clamp(min=0))  # of whole pixels, which lie together
    vectors = vectors.masked_fill(index.lt(0).unsqueeze(1), 0)
    patches = vectors.unflatten(1, (-1, math.prod(spec.kernel))).unflatten(3, (spec.groups, -1))
    rows: Tensor = patches.permute(3, 0, 1, 4, 2).flatten(3).flatten(1, 2)
    return rows


def _padded_numbers(spec: LayerSpec, sizes: Sequence[int]) -> Tensor:
    """Which pixel lies where, `[*padded sizes]`; -1 where there is a zero."""
    numbers, margins = torch.arange(math.prod(sizes)).view(1, 1, *sizes).double(), margins_of(spec)
    if spec.padding_mode == "zeros":
        padded = F.pad(numbers, margins, value=-1)
    else:
        padded = F.pad(numbers, margins, mode=spec.padding_mode) if any(margins) else numbers
    return padded[0, 0].long()


def lowered_outputs(y: Tensor, spec: LayerSpec, places: int | None, generator: torch.Generator) -> Tensor:
    """Rows `[groups, n, T / groups]` of a layer's output, or of a gradient there, in the same way."""
    axes = len(spec.kernel)
    if spec.kind == "linear":
        return _drawn(y, spec.out_channels, places, generator)
    return _places_of(y.unsqueeze(0) if y.dim() == axes + 1 else y, spec.groups, places, generator)


def margins_of(spec: LayerSpec) -> list[int]:
    """The padding as `F.pad` takes it, the last axis first."""
    if spec.padding == "same":  # as PyTorch: the odd one goes behind
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]
        amounts = [(total // 2, total - total // 2) for total in totals]
    else:
        amounts = [(int(p), int(p)) for p in spec.padding]
    return [n for pair in reversed(amounts) for n in pair]


def _places_of(x: Tensor, groups: int, places: int | None, generator: torch.Generator) -> Tensor:
    """`[N, channels, *size]` to `[groups, n, channels / groups]`."""
    drawn = x.flatten(2)[:, :, _draw(math.prod(x.shape[2:]), places, generator).to(x.device)]
    rows: Tensor = drawn.transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1)
    return rows


def _drawn(x: Tensor, channels: int, places: int | None, generator: torch.Generator) -> Tensor:
    """Vectors `[..., channels]` as `[1, n, channels]`; of sequences `[N, ..., channels]` some places of each."""
    if x.dim() < 3:
        return x.reshape(1, -1, channels)
    sequences = x.flatten(1, -2)
    return sequences[:, _draw(sequences.shape[1], places, generator).to(x.device)].reshape(1, -1, channels)


def _draw(count: int, most: int | None, generator: torch.Generator) -> Tensor:
    if most is None or count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values
