"""Test problems as data: layers with the shape of a batch of inputs, decompositions, rank rules."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from lowrank_pl.decompositions import (
    CP,
    SVD,
    BlockSVD,
    Decomposition,
    LowRankPlusColumns,
    LowRankPlusSparse,
    SeparableSVD,
    SpatialSVD,
    TensorTrain,
    TiledSVD,
    Tucker2,
)
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import spec_of
from lowrank_pl.ranks import (
    EVBMF,
    ADMMRanks,
    CompressionRatio,
    CostBudget,
    CostPenalty,
    EnergyThreshold,
    FixedRank,
    GreedyEnergy,
    MultipleOf,
    RankFraction,
    RankProblem,
)

# name: how the layer is made, shape of a batch of inputs
LAYERS: dict[str, tuple[partial[nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 12, 10), (3, 12)),
    "linear_tokens": (partial(nn.Linear, 12, 18, bias=False), (2, 5, 12)),
    "linear_wide": (partial(nn.Linear, 30, 4), (2, 3, 2, 30)),
    "linear_one_input": (partial(nn.Linear, 1, 5), (3, 1)),
    "linear_one_output": (partial(nn.Linear, 6, 1), (3, 6)),
    "conv1d": (partial(nn.Conv1d, 6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "conv1d_same": (partial(nn.Conv1d, 6, 8, 4, padding="same", dilation=3, bias=False), (2, 6, 10)),
    "conv1d_circular": (partial(nn.Conv1d, 6, 8, 3, padding=2, padding_mode="circular"), (2, 6, 7)),
    "conv1d_grouped": (partial(nn.Conv1d, 6, 9, 3, groups=3), (2, 6, 7)),
    "conv2d": (partial(nn.Conv2d, 8, 12, 3, padding=1), (2, 8, 6, 7)),
    "conv2d_no_bias": (partial(nn.Conv2d, 8, 12, 3, bias=False), (2, 8, 6, 7)),
    "conv2d_more_inputs": (partial(nn.Conv2d, 14, 5, 3, stride=2), (2, 14, 7, 6)),
    "conv2d_1x1": (partial(nn.Conv2d, 8, 12, 1, stride=2), (2, 8, 6, 7)),
    "conv2d_one_input": (partial(nn.Conv2d, 1, 6, 5, padding=2), (2, 1, 6, 7)),
    "conv2d_one_output": (partial(nn.Conv2d, 6, 1, 3), (2, 6, 6, 7)),
    "conv2d_strides": (partial(nn.Conv2d, 6, 9, 3, stride=(2, 1), padding=[0, 2]), (2, 6, 7, 6)),
    "conv2d_dilated": (partial(nn.Conv2d, 6, 9, 3, stride=(1, 2), dilation=(2, 3)), (2, 6, 8, 10)),
    "conv2d_row": (partial(nn.Conv2d, 6, 9, (1, 5), padding=(0, 2)), (2, 6, 6, 7)),
    "conv2d_valid": (partial(nn.Conv2d, 6, 9, (4, 3), padding="valid"), (2, 6, 6, 7)),
    "conv2d_same": (partial(nn.Conv2d, 6, 9, (2, 4), padding="same", dilation=(3, 1)), (2, 6, 6, 7)),
    "conv2d_reflect": (
        partial(nn.Conv2d, 6, 9, (3, 5), padding=(1, 3), stride=(1, 2), padding_mode="reflect"),
        (2, 6, 6, 7),
    ),
    "conv2d_replicate": (
        partial(nn.Conv2d, 6, 9, (5, 3), padding=(3, 0), padding_mode="replicate"),
        (2, 6, 6, 7),
    ),
    "conv2d_circular": (
        partial(nn.Conv2d, 6, 9, (3, 4), padding=(2, 1), dilation=(2, 1), padding_mode="circular"),
        (2, 6, 6, 7),
    ),
    "conv2d_same_reflect": (
        partial(nn.Conv2d, 6, 9, (2, 4), padding="same", padding_mode="reflect"),
        (2, 6, 6, 7),
    ),
    "conv2d_grouped": (partial(nn.Conv2d, 8, 12, 3, groups=2, stride=2, padding=1), (2, 8, 6, 7)),
    "conv2d_depthwise": (partial(nn.Conv2d, 6, 6, 3, groups=6, padding=1), (2, 6, 6, 7)),
    "conv2d_depthwise_twice": (partial(nn.Conv2d, 4, 8, 3, groups=4, bias=False), (2, 4, 6, 7)),
    "conv3d": (
        partial(nn.Conv3d, 3, 5, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 2)),
        (2, 3, 3, 5, 4),
    ),
    "conv3d_replicate": (
        partial(nn.Conv3d, 4, 3, 2, padding=1, padding_mode="replicate", bias=False),
        (2, 4, 3, 4, 3),
    ),
    "conv3d_grouped": (partial(nn.Conv3d, 4, 6, (2, 1, 3), groups=2), (2, 4, 3, 3, 4)),
    "transposed1d": (
        partial(nn.ConvTranspose1d, 6, 8, 3, stride=2, padding=1, output_padding=1),
        (2, 6, 5),
    ),
    "transposed2d": (partial(nn.ConvTranspose2d, 8, 6, 3, bias=False), (2, 8, 4, 5)),
    "transposed2d_strides": (
        partial(nn.ConvTranspose2d, 6, 9, (4, 2), (2, 3), padding=(1, 0), output_padding=(0, 2), dilation=(1, 2)),
        (2, 6, 4, 3),
    ),
    "transposed2d_grouped": (partial(nn.ConvTranspose2d, 8, 12, 3, stride=2, groups=4), (2, 8, 4, 3)),
    "transposed2d_depthwise": (partial(nn.ConvTranspose2d, 4, 4, 3, groups=4, bias=False), (2, 4, 4, 3)),
    "transposed3d": (partial(nn.ConvTranspose3d, 4, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 4, 2, 3, 2)),
}  # fmt: skip

DECOMPOSITIONS: tuple[Decomposition, ...] = (
    SVD(),
    SpatialSVD(),
    Tucker2(),
    SeparableSVD(),
    CP(),
    TiledSVD(7),
    TiledSVD(64, run="dense"),
    TiledSVD(8, run="factors"),
    BlockSVD(5),
    BlockSVD(1),
    TensorTrain(),
    TensorTrain(((2, 1, 5), (2, 3, 2)), run="factors"),
    TensorTrain(((3, 3, 2), (2, 3, 2)), run="dense"),
    LowRankPlusSparse(),
    LowRankPlusSparse("tucker2", share=0.2),
    LowRankPlusColumns(),
)

RULES = (
    FixedRank(1),
    FixedRank(3),
    FixedRank(1000),
    RankFraction(0.01),
    RankFraction(0.5),
    RankFraction(1.0),
    CompressionRatio(1.0),
    CompressionRatio(2.5),
    CompressionRatio(1000.0),
    EnergyThreshold(0.001),
    EnergyThreshold(0.4),
    EnergyThreshold(0.999),
    CostPenalty(0.0, "params"),
    CostPenalty(1e5, "params"),
    CostBudget("params", 1.0),
    CostBudget("params", 0.8),
    GreedyEnergy("params", 0.8),
    EVBMF(),
    ADMMRanks(0.3, 0.4),
    MultipleOf(CompressionRatio(2.0), 3),
)


def finals(base: type) -> Iterator[type]:
    """Every class of ours below `base` that nothing is derived from; tests may define others."""
    for kind in base.__subclasses__():
        if not kind.__subclasses__() and kind.__module__.startswith("lowrank_pl."):
            yield kind
        yield from finals(kind)


def supports(decomposition: Decomposition, layer: nn.Module) -> bool:
    """What the documentation promises."""
    groups = getattr(layer, "groups", 1)
    is_linear, is_2d = isinstance(layer, nn.Linear), isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    promised = {
        SVD: True,
        SpatialSVD: is_2d,
        SeparableSVD: is_2d and groups == 1,
        TiledSVD: groups == 1 or groups not in (layer.in_channels, layer.out_channels),
        BlockSVD: groups == 1,
        Tucker2: groups == 1 and not is_linear,
        CP: groups == 1 and not is_linear,
        LowRankPlusColumns: (layer.in_features if is_linear else layer.in_channels // groups) > 1,
    }
    if isinstance(decomposition, LowRankPlusSparse):
        return supports(decomposition.spectral, layer)
    if isinstance(decomposition, TensorTrain):
        return is_linear and can_be_train(decomposition, layer)
    return promised[type(decomposition)]


def can_be_train(decomposition: TensorTrain, layer: nn.Linear) -> bool:
    """Whether it is of the named shape, or not of two prime sizes."""
    sizes = layer.out_features, layer.in_features
    if decomposition.shape is not None:
        return tuple(map(prod, decomposition.shape)) == sizes
    return any(n % i == 0 for n in sizes for i in range(2, n))


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A layer of `LAYERS` with normal weights and a batch of its inputs, the same ones every time."""
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(len(name))
    layer = make()
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def spec_on(layer: nn.Module, x: Tensor) -> LayerSpec:
    """The layer's spec with the first input of the batch x as the network's input."""
    return spec_of(layer).with_(inputs=(input_size(layer, x[:1]),))


def input_size(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """`(vectors, *spatial size)` of a batch x of inputs."""
    if isinstance(layer, nn.Linear):
        return (x.numel() // layer.in_features,)
    return x.shape[0], *x.shape[2:]


def make_problem(decomposition: Decomposition, name: str, dtype: torch.dtype = torch.float64) -> RankProblem:
    """The rank problem of one layer of `LAYERS`."""
    layer, _ = make_layer(name, dtype)
    return RankProblem(name, spec_of(layer), decomposition, layer.weight.detach())


def some_ranks(full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Ranks from all ones to full, every entry growing."""
    shares = [0.0, 0.2, 0.45, 0.8, 1.0]
    ranks = [tuple(max(1, round(share * most)) for most in full) for share in shares]
    return ranks[:1] + [after for before, after in pairwise(ranks) if after != before]
