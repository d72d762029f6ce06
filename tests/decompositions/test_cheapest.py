"""A choice among structures, layer by layer."""

import itertools
import sys

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, some_ranks, supports
from torch import nn

from lowrank_pl import Cheapest, CostBudget, CostPenalty, FixedRank, Targets, compress, load_compressed, save_compressed
from lowrank_pl.adapters import find_maps
from lowrank_pl.compression import Compression
from lowrank_pl.costs import Params
from lowrank_pl.decompositions import (
    DENSE,
    SVD,
    ZERO,
    BlockSVD,
    Candidates,
    Choice,
    Decomposition,
    SpatialSVD,
    TiledSVD,
    Tucker2,
)
from lowrank_pl.layers import TiledLayer, spec_of
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import RankProblem, enumerate_ranks
from lowrank_pl.tracing import record

EVERYTHING = Targets(skip_first=False, skip_last=False)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 4, 10))


def test_it_is_made_of_names_and_objects():
    choice = Cheapest("svd", Tucker2())
    assert choice.members == (SVD(), Tucker2())
    assert choice == Cheapest(SVD(), "tucker2")
    with pytest.raises(TypeError, match="structures to choose among"):
        Cheapest()
    with pytest.raises(ValueError, match="sdv"):
        Cheapest("sdv")


def test_it_is_a_value_but_no_decomposition():
    """It has no ranks, factors or spectra of its own."""
    assert not issubclass(Cheapest, Decomposition)
    assert issubclass(Cheapest, Candidates)
    assert issubclass(Decomposition, Candidates)
    assert Cheapest.__dict__.get("__final__", sys.version_info < (3, 11))
    assert Cheapest.__dataclass_params__.frozen
    assert hash(Cheapest("svd", "tucker2")) == hash(Cheapest("svd", Tucker2()))
    assert Cheapest("svd", "tucker2") != Cheapest("tucker2", "svd")
    for name in ("full_rank", "layout", "analyze", "factor", "check_rank"):
        assert hasattr(Decomposition, name)
        assert not hasattr(Cheapest, name)
    with pytest.raises(ValueError, match="`method`"):
        Cheapest("cheapest")


@pytest.mark.parametrize("name", LAYERS)
def test_candidates_leave_out_what_is_unsupported(name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    supported = tuple(d for d in DECOMPOSITIONS if supports(d, layer))
    assert Cheapest(*DECOMPOSITIONS).candidates(spec) == supported
    assert Cheapest(*reversed(DECOMPOSITIONS)).candidates(spec) == supported[::-1]
    for decomposition in DECOMPOSITIONS:
        own = (decomposition,) if supports(decomposition, layer) else ()
        assert decomposition.candidates(spec) == Cheapest(decomposition).candidates(spec) == own
        reason = decomposition.unsupported(spec)
        named = None if reason is None else f"{type(decomposition).__name__} {reason}"
        assert Cheapest(decomposition).unsupported(spec) == named


def test_a_linear_layer_has_fewer_candidates():
    choice = Cheapest("tucker2", "spatial_svd", "svd")
    linear, conv = spec_of(nn.Linear(6, 5)), spec_of(nn.Conv2d(6, 5, 3))
    assert choice.candidates(linear) == (SVD(),)
    assert choice.candidates(conv) == (Tucker2(), SpatialSVD(), SVD())
    assert choice.unsupported(linear) is None
    none = Cheapest("tucker2", "spatial_svd")
    assert none.candidates(linear) == ()
    reason = "Tucker2 needs an ungrouped convolution, SpatialSVD needs a two-dimensional convolution"
    assert none.unsupported(linear) == reason
    problem = RankProblem("fc", linear, choice, torch.randn(5, 6))
    assert problem.candidates == (SVD(),)
    assert (problem.decomposition, problem.full) == (SVD(), (5,))


def test_its_factors_are_the_members_own():
    conv = nn.Conv2d(6, 5, 3)
    spec, weight = spec_of(conv), conv.weight.detach()
    problem = RankProblem("conv", spec, Cheapest("svd", "tucker2", TiledSVD(4)), weight, least=0)
    for member, rank in ((SVD(), (3,)), (Tucker2(), (2, 4)), (TiledSVD(4), (2,))):
        structure, expected = problem.structure(Choice(member, rank)), member.factor(weight, spec, rank)
        assert structure.layout == expected.layout == member.layout(spec, rank)
        assert all(map(torch.equal, structure.tensors, expected.tensors))
        assert structure.rank == rank
        assert structure.to_module(None) is not None
    assert torch.equal(problem.structure(DENSE).reconstruct(), weight)
    assert not problem.structure(ZERO).reconstruct().any()
    with pytest.raises(ValueError, match=r"'conv'.*Expected a rank"):
        problem.structure(Choice(SVD(), (99,)))


@pytest.mark.parametrize("layer", [nn.Linear(9, 8), nn.Conv2d(6, 5, 3), nn.ConvTranspose2d(4, 6, 3)], ids=str)
def test_all_ranks_of_all_candidates_are_weighed(layer):
    """Once each, beside the dense layer and, where it may be, none; no rank of a member that is not supported."""
    members = (Tucker2(), SVD(), BlockSVD(2))
    spec, weight = spec_of(layer), layer.weight.detach()
    expected = {DENSE: (layer.weight.numel(), 0.0), ZERO: (0, float(weight.double().square().sum()))}
    for member in (member for member in members if supports(member, layer)):
        for rank in itertools.product(*(range(1, most + 1) for most in member.full_rank(spec))):
            weights = sum(p.numel() for p in member.factor(weight, spec, rank).to_module(None).parameters())
            tails = zip(member.analyze(weight, spec).errors, rank, strict=True)
            if weights < layer.weight.numel():
                expected[Choice(member, rank)] = weights, sum(float(tail[r]) for tail, r in tails)
    for least in (0, 1):
        found = enumerate_ranks(RankProblem("", spec, Cheapest(*members), weight, least=least), Params())
        wanted = {choice: value for choice, value in expected.items() if least == 0 or choice != ZERO}
        assert len(found.choices) == len(wanted)
        for choice, cost, error in zip(found.choices, found.costs, found.errors, strict=True):
            assert wanted[choice] == (cost, pytest.approx(error, rel=1e-9))
        assert (sorted(found.costs) == found.costs).all()
        assert found.choices[-1] == DENSE


def compression(layer, method):
    return Compression(
        find_maps(nn.ModuleDict({"layer": layer}))["layer"], spec_of(layer), method, CostPenalty(1.0, "params")
    )


# layer, method, and its choices as checkpoints have always held them
CONV, LINEAR = nn.Conv2d(6, 5, 3), nn.Linear(6, 7)
STORED = [
    (CONV, SVD(), {ZERO: [0], Choice(SVD(), (3,)): [3], DENSE: [5]}),
    (LINEAR, BlockSVD(3), {ZERO: [0], Choice(BlockSVD(3), (1,)): [1], DENSE: [3]}),
    (CONV, TiledSVD(4), {ZERO: [0], Choice(TiledSVD(4), (3,)): [3], DENSE: [4]}),
    (CONV, Tucker2(), {ZERO: [0, 0], Choice(Tucker2(), (1, 5)): [1, 5], DENSE: [6, 5]}),
    (CONV, Cheapest("tucker2", "svd"), {
        ZERO: [0, 0, 0], Choice(Tucker2(), (2, 4)): [0, 2, 4], Choice(SVD(), (3,)): [1, 3], DENSE: [0, 6, 5],
    }),
    # the first two are not for linear layers, but count
    (LINEAR, Cheapest("tucker2", "spatial_svd", "svd", BlockSVD(3)), {
        ZERO: [0, 0], Choice(SVD(), (1,)): [2, 1], Choice(BlockSVD(3), (2,)): [3, 2], DENSE: [2, 6],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "method", "stored"), STORED, ids=lambda x: "" if isinstance(x, dict) else str(x))
def test_choices_in_checkpoints(layer, method, stored):
    c = compression(layer, method)
    for choice, values in stored.items():
        assert c.to_list(choice) == values
        assert c.from_list(values) == c.from_list(tuple(values)) == choice
        structure = c.problem().structure(c.from_list(values))
        if choice == ZERO:
            assert not structure.reconstruct().any()
        elif choice == DENSE:
            assert torch.equal(structure.reconstruct(), layer.weight)
        else:
            expected = choice.decomposition.factor(layer.weight, c.layer, choice.rank)
            assert torch.equal(structure.reconstruct(), expected.reconstruct())


@pytest.mark.parametrize("name", LAYERS)
def test_every_choice_survives_a_checkpoint(name):
    """Of every decomposition, alone and among others; a full rank comes back as what it deploys, the dense layer."""
    layer, _ = make_layer(name)
    several = Cheapest(*DECOMPOSITIONS)
    for decomposition in several.candidates(spec_of(layer)):
        for method in (decomposition, several):
            c = compression(layer, method)
            ranks = some_ranks(decomposition.full_rank(c.layer))
            for choice in (DENSE, ZERO, *(Choice(decomposition, rank) for rank in ranks[:-1])):
                assert all(type(value) is int for value in c.to_list(choice))
                assert c.from_list(c.to_list(choice)) == choice
            full = Choice(decomposition, ranks[-1])
            assert c.from_list(c.to_list(full)) == c.settled(full) == DENSE


def test_only_rules_that_compare_can_choose():
    with pytest.raises(ValueError, match="FixedRank does not weigh"):
        make_plan(net(), Cheapest("svd", "tucker2"), FixedRank(3), EVERYTHING)


def test_it_is_never_worse_than_its_members(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    rule = CostPenalty(3000.0, "macs")

    def objective(method):
        model = net()
        small = compress(model, method, rule, EVERYTHING, x)
        plan = make_plan(model, method, rule, EVERYTHING, record(model, x))
        choices = plan.choose_ranks()
        cost = sum(c.cost(rule.cost, choices[c.name]) for c in plan.compressions)
        error = sum(
            float((c.read() - c.problem().structure(c.settled(choices[c.name])).reconstruct()).square().sum())
            for c in plan.compressions
        )
        return 3e-3 * cost + error, small

    both, small = objective(Cheapest("svd", "spatial_svd"))
    conv_only = {"3": "svd", "*": "spatial_svd"}
    assert both <= min(objective("svd")[0], objective(conv_only)[0]) + 1e-9
    save_compressed(small, tmp_path)
    assert torch.equal(load_compressed(net(), tmp_path)(x), small(x))


def test_tiles_among_the_choices():
    x = torch.randn(2, 3, 8, 8)
    small = compress(net(), Cheapest(TiledSVD(8)), CostBudget("params", 0.5), EVERYTHING, x)
    assert any(isinstance(module, TiledLayer) for module in small.modules())
    notes = small.lowrank_pl_record["notes"]
    assert any("runs" in note for note in notes.values())
