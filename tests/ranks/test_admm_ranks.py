"""Rank and channels of the convex problem, in a network and by hand."""

import copy

import pytest
import torch
from torch import nn

from lowrank_pl import ADMMRanks, LowRankPlusColumns, Targets, compress, load_compressed, save_compressed
from lowrank_pl.decompositions import SVD, Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric
from lowrank_pl.ranks import RankProblem
from lowrank_pl.structures import SomeChannels, Sum

LAYER = LayerSpec("linear", 30, 20)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted():
    """Rank 3 and four columns, in a little noise."""
    weight = normal(20, 3, seed=1) @ normal(3, 30, seed=2) + 0.05 * normal(20, 30, seed=3)
    weight[:, [2, 11, 17, 29]] += 5 * normal(20, 4, seed=4)
    return weight


@pytest.mark.parametrize("correlated", [False, True])
def test_planted_structure_is_found(correlated):
    metric = None
    if correlated:
        x = normal(400, 30, seed=5) * torch.linspace(0.5, 1.5, 30).double()
        metric = Metric(LAYER, Root.of((x.mT @ x / 400).unsqueeze(0)))
    problem = RankProblem("fc", LAYER, LowRankPlusColumns(), planted(), metric=metric)
    (choice,) = ADMMRanks(0.3, 0.3)([problem])
    rank, channels = choice.rank
    assert rank == 3
    assert channels == 4 if metric is None else 4 <= channels <= 6
    structure = problem.structure(choice)
    assert structure.layout.parts[0].count == channels
    assert {2, 11, 17, 29} <= set(structure.tensors[1].tolist())


def test_lambdas_say_which_part_is_dear():
    problem = RankProblem("fc", LAYER, LowRankPlusColumns(), planted())
    ((rank, channels),) = [choice.rank for choice in ADMMRanks(50.0, 0.2)([problem])]
    assert channels == 0 < rank
    ((rank, channels),) = [choice.rank for choice in ADMMRanks(0.2, 50.0)([problem])]
    assert rank == 0 < channels
    assert ADMMRanks(50.0, 50.0)([problem]) == [Choice(LowRankPlusColumns(), (1, 0))]


def test_of_an_svd_it_is_the_soft_threshold_of_its_spectrum():
    """`argmin ||W - B||^2 / ||W||^2 + lambda ||B||_* / ||W||_*`, by its optimality conditions."""
    weight = planted()
    (choice,) = ADMMRanks(1.0, 0.4)([RankProblem("fc", LAYER, SVD(), weight)])
    values = torch.linalg.svdvals(weight)
    least = 0.4 / values.sum() * weight.square().sum() / 2
    assert choice.rank == (int((values > least).sum()),)


def test_without_training(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    ).eval()
    with torch.no_grad():
        net[2].weight.copy_((torch.randn(24, 2) @ torch.randn(2, 144) / 20).view(24, 16, 3, 3) + net[2].weight / 10)
        net[2].weight[:, [3, 7]] += 0.3 * torch.randn(24, 2, 3, 3)
    data = [torch.randn(20, 3, 8, 8) for _ in range(12)]
    fresh, targets = copy.deepcopy(net), Targets(include=["2"])
    for mode in ("outputs", "asymmetric", "nonlinear"):
        small = compress(net, "low_rank_plus_columns", ADMMRanks(0.3, 0.4), targets, data=data, reconstruct=mode)
        layout = small[2].layout
        assert isinstance(layout, Sum)
        assert isinstance(layout.parts[0], SomeChannels)
        assert {3, 7} <= set(small[2].branches[0].channels.tolist())
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        save_compressed(small, tmp_path / mode)
        again = load_compressed(fresh, tmp_path / mode)
        with torch.no_grad():
            assert torch.equal(again(data[0]), small(data[0]))
            error = float((small(data[0]) - net(data[0])).norm() / (net(data[0]) - net(data[0]).mean(0)).norm())
        assert error < 0.6
    with pytest.raises(ValueError, match="Expected argument `data`"):
        compress(net, "low_rank_plus_columns", ADMMRanks(0.3, 0.4), targets, reconstruct="nonlinear")
