"""What every rank rule promises, for every decomposition; new rules are found by themselves."""

import dataclasses
import sys
from functools import partial

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, RULES, finals, make_layer, make_problem, supports
from optimum import count_analyses

from lowrank_pl.decompositions import DENSE, SVD, Choice
from lowrank_pl.ranks import (
    ADMMRanks,
    CompressionRatio,
    CostBudget,
    CostPenalty,
    EnergyThreshold,
    FixedRank,
    GreedyEnergy,
    MultipleOf,
    RankFraction,
    RankRule,
)

each_rule = pytest.mark.parametrize("rule", RULES, ids=str)
each_decomposition = pytest.mark.parametrize("decomposition", DECOMPOSITIONS, ids=lambda x: str(x).replace(" ", ""))


def problems_of(decomposition, dtype=torch.float64):
    return [make_problem(decomposition, name, dtype) for name in LAYERS if supports(decomposition, make_layer(name)[0])]


def test_every_rule_has_an_instance():
    assert {type(rule) for rule in RULES} == set(finals(RankRule))


@pytest.mark.parametrize("kind", list(finals(RankRule)))
def test_final_and_frozen(kind):
    assert kind.__dict__.get("__final__", sys.version_info < (3, 11))
    assert kind.__dataclass_params__.frozen


@each_rule
@each_decomposition
def test_one_rank_within_bounds_for_each_problem(decomposition, rule):
    problems = problems_of(decomposition)
    choices = rule(problems)
    assert len(choices) == len(problems)
    for problem, choice in zip(problems, choices, strict=True):
        full = decomposition.full_rank(problem.layer)
        assert isinstance(choice, Choice)
        assert isinstance(choice.rank, tuple)
        structure = problem.structure(choice)
        assert structure.layout == choice.layout(problem.layer)
        if choice == DENSE:
            assert rule.compares
            assert torch.equal(structure.reconstruct(), problem.weight)
            continue
        assert choice.decomposition == decomposition
        assert len(choice.rank) == len(full)
        assert all(type(r) is int for r in choice.rank)
        assert decomposition.is_rank(problem.layer, choice.rank)
        alone = decomposition.factor(problem.weight, problem.layer, choice.rank)
        assert torch.equal(structure.reconstruct(), alone.reconstruct())


@each_rule
@each_decomposition
def test_choices_do_not_depend_on_scale_or_order(decomposition, rule):
    problems = problems_of(decomposition)
    scale = 1.0 if isinstance(rule, CostPenalty) else 2.0**20  # a price is for errors of a certain size
    scaled = [dataclasses.replace(problem, weight=problem.weight * scale) for problem in reversed(problems)]
    assert rule(scaled) == rule(problems)[::-1]


@each_rule
def test_no_problems(rule):
    assert rule([]) == []


@each_rule
def test_zero_weights(rule):
    problem = make_problem(DECOMPOSITIONS[0], "conv2d")
    zero = dataclasses.replace(problem, weight=torch.zeros_like(problem.weight))
    (choice,) = rule([zero])
    (r,) = choice.rank
    assert choice.decomposition == DECOMPOSITIONS[0]
    assert 1 <= r <= problem.full[0]


@each_rule
def test_notes_are_text(rule):
    for decomposition in DECOMPOSITIONS:
        problems = problems_of(decomposition)
        for problem, choice in zip(problems, rule(problems), strict=True):
            assert isinstance(rule.note(problem, choice.rank or problem.full), str | None)


@each_rule
def test_ranks_and_factors_come_from_one_decomposition(rule, monkeypatch):
    for decomposition in DECOMPOSITIONS:
        with monkeypatch.context() as patched:
            analyzed = count_analyses(patched, decomposition)
            problems = problems_of(decomposition)
            for problem, choice in zip(problems, rule(problems), strict=True):
                assert problem.errors
                problem.structure(choice)
            assert sorted(id(weight) for weight, _ in analyzed) == sorted(id(problem.weight) for problem in problems)


def test_weights_are_counted_as_stored():
    for decomposition in DECOMPOSITIONS:
        for problem in problems_of(decomposition):
            structure = decomposition.factor(problem.weight, problem.layer, problem.full)
            parameters = structure.to_module(None).parameters()
            assert problem.num_weights(problem.full) == sum(p.numel() for p in parameters)


BAD_ARGUMENTS = [
    (FixedRank, "r", [0, -1, 2.0, "2", None, True, (2, -1), (0, 0)]),
    (RankFraction, "R_c", [0, -0.5, 1.01, 2, "0.5", None, True, float("nan"), float("inf")]),
    (CompressionRatio, "x", [0, 0.99, -2, "2", None, True, float("nan")]),
    (EnergyThreshold, "p", [0, 1, -0.1, 1.5, "0.9", None, True, float("nan")]),
    (CostPenalty, "lambda_", [-1e-9, "1", None, True, float("nan")]),
    (partial(CostPenalty, 1.0), "cost", ["mac", None, 3]),
    (partial(CostPenalty, 1.0, "params"), "most", [0, -1, 2.0, "8", True, {}, {"*": 0}, {"*": None}, (2,)]),
    (partial(CostBudget, "params", 0.5), "most", [0, True, {"*": "3"}]),
    (partial(CostBudget, "params"), "ratio", [0, -0.5, 1.01, "0.5", None, True, float("nan")]),
    (CostBudget, "cost", ["mac", None, 3]),
    (partial(GreedyEnergy, "params"), "ratio", [0, -0.5, 1.01, "0.5", None, True, float("nan")]),
    (partial(ADMMRanks, lambda_2=0.1), "lambda_1", [0, -1, "1", None, True, float("nan"), float("inf")]),
    (partial(ADMMRanks, 0.1), "lambda_2", [0, "0.1", float("inf")]),
    (partial(MultipleOf, FixedRank(8)), "m", [0, -8, 2.0, "8", None, True]),
]


@pytest.mark.parametrize(("kind", "argument", "value"), [(k, a, v) for k, a, values in BAD_ARGUMENTS for v in values])
def test_bad_arguments(kind, argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}`.* but got "):
        kind(value)


def test_every_rule_has_bad_arguments():
    kinds = {getattr(kind, "func", kind) for kind, *_ in BAD_ARGUMENTS}
    assert kinds == {kind for kind in finals(RankRule) if dataclasses.fields(kind)}


def test_errors_name_the_layer_once():
    problem = make_problem(SVD(), "conv2d")
    broken = dataclasses.replace(problem, weight=torch.full_like(problem.weight, torch.nan))
    choice = Choice(SVD(), (2,))
    for act in (lambda: broken.errors, lambda: broken.structure(choice), lambda: CostPenalty(1.0, "params")([broken])):
        with pytest.raises(ValueError, match=r"^Layer 'conv2d': Expected finite weights"):
            act()
    with pytest.raises(ValueError, match=r"^Layer 'conv2d': Expected a rank from \(1,\) to \(12,\) but got \(13,\)"):
        problem.structure(Choice(SVD(), (13,)))
