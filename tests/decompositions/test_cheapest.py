"""A choice among structures, layer by layer."""

import pytest
import torch
from torch import nn

from lowrank_pl import Cheapest, CostBudget, CostPenalty, FixedRank, Targets, compress, load_compressed, save_compressed
from lowrank_pl.decompositions import SVD, SpatialSVD, TiledSVD, Tucker2, alternatives, chosen
from lowrank_pl.layers import TiledLayer, spec_of
from lowrank_pl.planning import make_plan
from lowrank_pl.surgery import record

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


def test_a_linear_layer_has_fewer_alternatives():
    choice = Cheapest("tucker2", "spatial_svd", "svd")
    linear, conv = spec_of(nn.Linear(6, 5)), spec_of(nn.Conv2d(6, 5, 3))
    assert [start for start, _ in alternatives(choice, linear)] == [(2,)]
    assert choice.full_rank(linear) == (2, 5)
    assert len(alternatives(choice, conv)) == 3
    assert choice.unsupported(linear) is None
    assert "Conv2d" in Cheapest("tucker2", "spatial_svd").unsupported(linear)
    assert chosen(choice, (1, 4)) == (SpatialSVD(), (4,))


def test_its_factors_are_the_members_own():
    conv = nn.Conv2d(6, 5, 3)
    spec = spec_of(conv)
    choice = Cheapest("svd", "tucker2", TiledSVD(4))
    for rank in ((0, 3), (1, 2, 4), (2, 2)):
        member, own = chosen(choice, rank)
        structure = choice.factor(conv.weight, spec, rank)
        assert torch.equal(structure.reconstruct(), member.factor(conv.weight, spec, own).reconstruct())
        assert structure.rank == rank
        assert choice.stages(spec, rank) == member.stages(spec, own)
        assert structure.to_module(None) is not None
    with pytest.raises(ValueError, match="number of a structure below 3"):
        choice.factor(conv.weight, spec, (3, 1))
    with pytest.raises(ValueError, match="Expected a rank"):
        choice.factor(conv.weight, spec, (0, 99))


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
        ranks = plan.choose_ranks()
        cost = sum(c.cost(rule.cost, ranks[c.name]) for c in plan.compressions)
        error = sum(
            float((c.weight - c.factor(c.weight, ranks[c.name]).reconstruct()).square().sum())
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
