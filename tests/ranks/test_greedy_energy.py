"""The greedy rule against one written here, from numpy's singular values, and against the optimum."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum import count_weights, least_loss
from torch import nn

from lowrank_pl.decompositions import DENSE, SVD, BlockSVD, Cheapest, Choice, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.layers import spec_of
from lowrank_pl.models import CifarResNet, LeNet5, LeNet300, load_weights
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import GreedyEnergy, RankProblem, enumerate_ranks
from lowrank_pl.structures import total_macs
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import record

SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA", "")
STRUCTURES = [SVD(), SpatialSVD(), BlockSVD(4), TiledSVD(6), Tucker2()]


def matrices(decomposition, weight):
    """Per entry of the rank, the matrices of which it says how many singular values are kept. `weight` [T, S, d, d]."""
    T, S, d, _ = weight.shape
    if isinstance(decomposition, SVD):
        return [[weight.reshape(T, -1)]]
    if isinstance(decomposition, SpatialSVD):  # [T, width] x [S, height]
        return [[weight.transpose(0, 3, 1, 2).reshape(T * d, S * d)]]
    if isinstance(decomposition, BlockSVD):
        return [[weight[:, i : i + 4].reshape(T, -1) for i in range(0, S, 4)]]
    if isinstance(decomposition, TiledSVD):
        flat = weight.reshape(T, -1)
        return [[flat[i : i + 6, j : j + 6] for i, j in product(range(0, T, 6), range(0, S * d * d, 6))]]
    return [[weight.transpose(1, 0, 2, 3).reshape(S, -1)], [weight.reshape(T, -1)]]


def candidates(problem, count):
    """`(choice, cost of the factors, deployed cost, logarithm of the kept share, that as deployed)` at every rank."""
    weight, layer = problem.weight.numpy(), problem.layer
    energy, dense = np.square(weight).sum(), count((layer,))
    found = []
    for member in problem.candidates:
        tails = []
        for entry in matrices(member, weight):
            squares = np.sum([np.linalg.svd(m, compute_uv=False) ** 2 for m in entry], axis=0)
            tails.append([squares[r:].sum() for r in range(len(squares) + 1)])
        for rank in product(*(range(1, len(tail)) for tail in tails)):
            choice, layout = Choice(member, rank), member.layout(layer, rank)
            share = 1 - sum(tail[r] for tail, r in zip(tails, rank, strict=True)) / energy
            kept = np.log(max(share, 1e-9))  # Tucker-2's bound can leave nothing
            cost = count(layout.stages)
            if cost < dense and layout.num_weights < layer.num_weights:
                found.append((choice, cost, cost, kept, kept))
            else:
                found.append((DENSE, cost, dense, kept, 0.0))
    return found


def naive(problems, count, budget):
    """From full ranks to the cheaper rank, of any layer, whose kept share's logarithm falls least per cost saved, with
    the factors' costs, until what is deployed fits; then to whatever still fits, the most gained per cost first."""
    tables = [candidates(problem, count) for problem in problems]
    at = [min((entry for entry in table if entry[3] == 0), key=lambda entry: entry[1]) for table in tables]
    while sum(entry[2] for entry in at) > budget:
        moves = []
        for k, table in enumerate(tables):
            for entry in table:
                if entry[1] < at[k][1]:
                    moves.append(((at[k][3] - entry[3]) / (at[k][1] - entry[1]), k, entry))
        _, k, entry = min(moves, key=lambda move: move[0])
        at[k] = entry
    while True:
        rest, moves = budget - sum(entry[2] for entry in at), []
        for k, table in enumerate(tables):
            for entry in table:
                more, gain = entry[2] - at[k][2], entry[4] - at[k][4]
                if 0 < more <= rest and gain > 0:
                    moves.append((gain / more, k, entry))
        if not moves:
            return [entry[0] for entry in at]
        _, k, entry = max(moves, key=lambda move: move[0])
        at[k] = entry


SMALLEST = Choice(SVD(), (1,))


def a_function(stages):
    return sum(7.0 + 3.0 * stage.out_channels + stage.num_weights**0.9 for stage in stages)


COSTS = {
    "params": ("params", count_weights),
    "macs": ("macs", total_macs),
    "function": (lambda layer: a_function([layer]), a_function),
}


def three_layers(decomposition):
    """One kernel whose spectrum falls slowly, one whose falls faster, one of other sizes."""
    generator = torch.Generator().manual_seed(0)
    problems = []
    for k, (inputs, outputs, falls) in enumerate([(8, 12, 0.5), (8, 12, 2.0), (16, 12, 1.0)]):
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1).double()
        noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        left, values, right = torch.linalg.svd(noise.flatten(1), full_matrices=False)
        values = values * torch.arange(1, len(values) + 1) ** -falls
        weight = (left * values @ right).view_as(noise)
        spec = spec_of(layer).with_(inputs=((1, 9 - k, 7),))
        problems.append(RankProblem(f"layer{k}", spec, decomposition, weight))
    return problems


@pytest.mark.parametrize("decomposition", [*STRUCTURES, Cheapest(*STRUCTURES)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("cost", COSTS)
def test_against_a_naive_one(decomposition, cost):
    problems = three_layers(decomposition)
    named, count = COSTS[cost]
    dense = sum(count((problem.layer,)) for problem in problems)
    seen = set()
    for ratio in (0.95, 0.8, 0.65, 0.5, 0.35, 0.25):
        try:
            choices = GreedyEnergy(named, ratio)(problems)
        except ValueError:
            assert sum(min(entry[2] for entry in candidates(p, count)) for p in problems) > ratio * dense
            continue
        assert choices == naive(problems, count, ratio * dense)
        seen.add(tuple(choices))
    assert len(seen) >= 3


def test_a_budget_just_reachable_and_one_that_asks_for_nothing():
    problems = three_layers(SVD())
    dense = sum(problem.layer.num_weights for problem in problems)
    least = sum(problem.num_weights((1,)) for problem in problems)
    assert GreedyEnergy("params", least / dense)(problems) == [SMALLEST] * 3
    assert GreedyEnergy("params", 1.0)(problems) == [DENSE] * 3


def test_a_layer_that_no_rank_makes_cheaper_stays_dense():
    """Its factors would have 41 weights; what counts are the 40 that it has."""
    layer = nn.Linear(1, 40).double()
    problems = [RankProblem("thin", spec_of(layer), SVD(), layer.weight.detach()), *three_layers(SVD())]
    dense = sum(problem.layer.num_weights for problem in problems)
    least = 40 + sum(problem.num_weights((1,)) for problem in problems[1:])
    assert GreedyEnergy("params", least / dense)(problems) == [DENSE, *[SMALLEST] * 3]
    thin, *choices = GreedyEnergy("params", 0.6)(problems)
    assert thin == DENSE
    assert choices == naive(problems[1:], count_weights, 0.6 * dense - 40)


def shortage(net, shape, ratio, method="svd", cost="macs"):
    """By how much the logarithm of the product of the kept shares is below the best that the budget allows."""
    rule = GreedyEnergy(cost, ratio)
    plan = make_plan(net, method, rule, Targets(skip_first=False, skip_last=False), record(net, torch.zeros(1, *shape)))
    chosen = plan.choose_ranks()
    tables, found, spent = [], 0.0, 0.0
    for c in plan.compressions:
        choices = enumerate_ranks(c.problem(), rule.charged)
        shares = np.maximum(1 - choices.errors / float(c.read().double().square().sum()), 1e-9)
        tables.append((choices.costs, -np.log(shares)))
        i = choices.index(chosen[c.name])
        found, spent = found - np.log(shares[i]), spent + choices.costs[i]
    rest = sum(rule.charged(layer) for layer in plan.others(plan.compressions))
    dense = sum(rule.charged(layer) for layer in plan.specs.values())
    assert spent + rest <= ratio * dense
    return found - least_loss(tables, ratio * dense - rest)


def with_falling_spectra(net, seed):
    """Singular vectors at random, singular values that fall as those of trained layers do, some faster than others."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            noise = torch.randn(module.weight.flatten(1).shape, generator=generator)
            left, _, right = torch.linalg.svd(noise, full_matrices=False)
            falls, floor = torch.rand(2, generator=generator)
            steps = torch.arange(1, left.shape[1] + 1)
            values = steps ** -(0.4 + falls) + 0.1 * floor
            module.weight.data = (left * values @ right).view_as(module.weight)
    return net.eval()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("make", "ratio", "allowed"), [(LeNet300, 0.17, 0.02), (LeNet5, 0.14, 0.1)])
def test_close_to_the_optimum(make, ratio, allowed, seed):
    assert -1e-9 <= shortage(with_falling_spectra(make(), seed), (1, 28, 28), ratio) <= allowed


def test_close_to_the_optimum_where_the_way_down_is_not_convex():
    """Tucker-2 and mixed structures, whose next cheaper rank may be far worse than others further down."""
    for method in ("tucker2", Cheapest("svd", "spatial_svd", "tucker2")):
        net = with_falling_spectra(LeNet5(), 0)
        assert all(shortage(net, (1, 28, 28), ratio, method) <= 0.15 for ratio in (0.3, 0.5, 0.7))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with trained ResNets")
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_close_to_the_optimum_on_a_trained_resnet(cost):
    net = CifarResNet(depth=20).eval()
    load_weights(net, Path(SHARED_DATA) / "resnet20-cifar10.safetensors")
    assert -1e-9 <= shortage(net, (3, 32, 32), 0.5, cost=cost) <= 0.1
