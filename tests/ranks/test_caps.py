"""The caps R_k of the LC paper's equation 1, against brute force."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from optimum import count_analyses, least_loss
from torch import nn

from lowrank_pl import DeepTwist, LearningCompression
from lowrank_pl.decompositions import DENSE, SVD, ZERO, Cheapest, Choice, SpatialSVD, Tucker2
from lowrank_pl.layers import spec_of
from lowrank_pl.methods import c_step
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import CostBudget, CostPenalty, RankProblem
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import record

CHEAPEST = Cheapest("svd", "spatial_svd", "tucker2")


def problems_of(decomposition, least=1, count=3):
    problems = []
    for k in range(count):
        torch.manual_seed(k)
        layer = nn.Conv2d(8, 6 + 2 * k, 3).double()
        left, values, right = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        values = values * torch.arange(1, len(values) + 1) ** -(0.5 * k)
        weight = (left * values @ right).view_as(layer.weight)
        problems.append(RankProblem(f"conv{k}", spec_of(layer), decomposition, weight, 1.0, least))
    return problems


def allowed(problem, cap):
    """`{choice: (weights, error)}` of all ranks up to the cap that have fewer weights than the layer, by factoring; of
    the dense layer where its full rank is no larger; of rank 0."""
    found = {}
    for member in problem.candidates:
        full = member.full_rank(problem.layer)
        tails = member.analyze(problem.weight, problem.layer).errors
        for rank in product(*(range(1, min(most, cap) + 1) for most in full)):
            weights = member.layout(problem.layer, rank).num_weights
            if weights < problem.layer.num_weights:
                error = sum(float(tail[r]) for tail, r in zip(tails, rank, strict=True))
                found[Choice(member, rank)] = (weights, error)
        if max(full) <= cap:
            found[DENSE] = (problem.layer.num_weights, 0.0)
    if problem.least == 0:
        found[ZERO] = (0, float(problem.weight.square().sum()))
    return found


@pytest.mark.parametrize("decomposition", [SVD(), SpatialSVD(), Tucker2(), CHEAPEST], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("cap", [1, 2, 3, 6, 8, 10, 30])
def test_against_brute_force(decomposition, least, cap):
    problems = problems_of(decomposition, least)
    tables = [allowed(problem, cap) for problem in problems]
    for lambda_ in (0.0, 1e2, 1e3, 1e4, 1e7):
        choices = CostPenalty(lambda_, "params", cap)(problems)
        for problem, table, choice in zip(problems, tables, choices, strict=True):
            assert choice in table, problem.name  # in particular not dense
            values = {each: lambda_ / 1e6 * weights + error for each, (weights, error) in table.items()}
            assert values[choice] == pytest.approx(min(values.values()), rel=1e-9)
    dense = sum(problem.layer.num_weights for problem in problems)
    for ratio in (0.3, 0.6, 1.0):
        choices = CostBudget("params", ratio, cap)(problems)
        chosen = [table[choice] for table, choice in zip(tables, choices, strict=True)]
        assert sum(weights for weights, _ in chosen) <= ratio * dense
        best = least_loss([np.transpose(list(table.values())) for table in tables], ratio * dense)
        assert sum(error for _, error in chosen) <= 1.0011 * best + 1e-12


def svds(*ranks):
    return [Choice(SVD(), (r,)) for r in ranks]


def test_a_mapping_caps_the_layers_that_it_names():
    problems = problems_of(SVD())
    most = {"conv1": 2, "conv*": 4, "*2": 1}
    for rule in (CostPenalty(0.0, "params", most), CostBudget("params", 1.0, most)):
        assert rule(problems) == svds(4, 2, 4)
    assert CostPenalty(0.0, "params", {"conv1": 2})(problems) == [DENSE, *svds(2), DENSE]
    with pytest.raises(ValueError, match=r"Pattern 'fc' in `most` matches none"):
        CostPenalty(0.0, "params", {"fc": 2})(problems)
    assert CostPenalty(0.0, "params", {"fc": 2})([]) == []


def test_a_cap_that_leaves_nothing_cheaper_is_refused():
    layer = nn.Linear(2, 2)
    for least in (0, 1):
        problem = RankProblem("small", spec_of(layer), SVD(), layer.weight.detach(), least=least)
        with pytest.raises(ValueError, match="Layer 'small': no rank up to the cap of 1 is cheaper"):
            CostPenalty(0.0, "params", 1)([problem])
        assert CostPenalty(0.0, "params", 2)([problem]) == [DENSE]


@pytest.mark.parametrize("by_budget", [False, True])
def test_learning_compression_and_deeptwist_keep_to_the_caps(by_budget):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 10))
    trace = record(net, torch.randn(1, 3, 8, 8))
    targets, most = Targets(skip_first=False, skip_last=False), {"2": 5, "*": 3}
    given = (
        {"budget": CostBudget("params", 0.9, most)} if by_budget else {"lambda_": 0.0, "cost": "params", "most": most}
    )
    callback = LearningCompression(**given, l_step_epochs=1, targets=targets)
    plan = make_plan(net, "svd", callback.rule, targets, trace, training=True)
    expected = dict(zip("024", svds(3, 5, 3), strict=True))
    state = None
    for mu in (0.1, 0.2, 0.4):
        state, _ = c_step(plan, callback.rule, state, mu, 2 * mu)
        assert state.choices == expected
        assert [int(torch.linalg.matrix_rank(s.reconstruct().flatten(1))) for s in state.structures.values()] == [
            3,
            5,
            3,
        ]
    rule = CostBudget("macs", 1.0, most) if by_budget else CostPenalty(0.0, "macs", most)
    twist = DeepTwist(S_D=1, method="svd", rank=rule, targets=targets)
    assert make_plan(net, "svd", twist.rank, targets, trace).choose_ranks() == expected


@pytest.mark.parametrize("most", [None, 3, {"conv1": 2}], ids=str)
@pytest.mark.parametrize(
    "kind", [partial(CostPenalty, 0.5), partial(CostBudget, ratio=0.5)], ids=lambda k: k.func.__name__
)
@pytest.mark.parametrize("decomposition", [SVD(), CHEAPEST], ids=lambda d: type(d).__name__)
def test_ranks_and_factors_come_from_one_decomposition(monkeypatch, kind, most, decomposition):
    """Of each weight by each structure, with caps too."""
    problems = problems_of(decomposition)
    expected = [(id(problem.weight), member) for problem in problems for member in problem.candidates]
    analyzed = count_analyses(monkeypatch, *problems[0].candidates)
    for problem, choice in zip(problems, kind(cost="params", most=most)(problems), strict=True):
        assert problem.errors
        problem.structure(choice)
    assert [(id(weight), member) for weight, member in analyzed] == expected


def test_a_budget_has_its_own_caps():
    with pytest.raises(ValueError, match="`most` beside `lambda_` only"):
        LearningCompression(budget=CostBudget("params", 0.5), most=3, l_step_epochs=1)
