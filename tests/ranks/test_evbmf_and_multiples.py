"""EVBMF on layers with planted ranks, and multiples of other rules' ranks."""

import pytest
import torch
from torch import nn

from lowrank_pl.decompositions import SVD, BlockSVD, Cheapest, Choice, TiledSVD, Tucker2
from lowrank_pl.layers import spec_of
from lowrank_pl.ranks import EVBMF, CompressionRatio, CostBudget, FixedRank, MultipleOf, RankProblem


def planted(decomposition, layer, rank, noise=0.02):
    """A weight of that layer with this very rank, and noise on top."""
    torch.manual_seed(0)
    spec = spec_of(layer)
    exact = decomposition.factor(torch.randn_like(layer.weight), spec, rank).reconstruct()
    weight = exact / exact.std() + noise * torch.randn_like(exact)
    return RankProblem("layer", spec, decomposition, weight)


@pytest.mark.parametrize(
    ("decomposition", "layer", "rank"),
    [
        (SVD(), nn.Linear(200, 60), (7,)),
        (SVD(), nn.Conv2d(32, 64, 3), (11,)),
        (SVD(), nn.Conv2d(32, 64, 3, groups=2), (5,)),
        (Tucker2(), nn.Conv2d(32, 48, 3), (6, 9)),
        (BlockSVD(16), nn.Conv2d(64, 64, 3), (4,)),
        (TiledSVD(64), nn.Conv2d(64, 64, 3), (3,)),
    ],
    ids=str,
)
def test_planted_ranks(decomposition, layer, rank):
    assert EVBMF()([planted(decomposition, layer, rank)]) == [Choice(decomposition, rank)]


def test_noise_alone_gives_the_smallest_rank():
    problem = RankProblem("fc", spec_of(nn.Linear(100, 50)), SVD(), torch.randn(50, 100))
    assert EVBMF()([problem]) == [Choice(SVD(), (1,))]


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 8), (7, 8), (8, 8), (15, 8), (16, 16), (29, 24), (30, 30), (99, 30)]
)
def test_multiples_round_down_but_never_to_nothing(rank, expected):
    problem = RankProblem("fc", spec_of(nn.Linear(40, 30)), SVD(), torch.randn(30, 40))
    assert MultipleOf(FixedRank(rank), 8)([problem]) == [Choice(SVD(), (expected,))]  # 30 is full
    assert MultipleOf(FixedRank(rank), 64)([problem]) == [Choice(SVD(), (30,))]


def test_multiples_of_several_entries_and_of_a_choice():
    conv = nn.Conv2d(40, 50, 3)
    problem = RankProblem("conv", spec_of(conv), Tucker2(), conv.weight.detach())
    (choice,) = MultipleOf(CompressionRatio(4.0), 8)([problem])
    a, b = choice.rank
    assert choice.decomposition == Tucker2()
    assert a % 8 == b % 8 == 0
    rule = MultipleOf(CostBudget("params", 0.3), 4)
    assert rule.compares
    assert not MultipleOf(FixedRank(1), 4).compares
    several = RankProblem("conv", spec_of(conv), Cheapest("svd", "tucker2"), conv.weight.detach())
    (choice,) = rule([several])
    assert choice.decomposition in (SVD(), Tucker2())
    assert len(choice.rank) == len(choice.decomposition.full_rank(several.layer))
    assert all(r % 4 == 0 for r in choice.rank)
    note = MultipleOf(FixedRank(999), 8).note(problem, (40, 50))
    assert note == FixedRank(999).note(problem, (40, 50))
