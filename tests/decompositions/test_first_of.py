"""An order of decompositions, of which each layer gets the first that is for its kind."""

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, supports
from torch import nn

from lowrank_pl import CompressionRatio, CostPenalty, DeepTwist, FirstOf, LearningCompression, Targets, compress
from lowrank_pl.decompositions import SVD, Choice, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.layers import TiledLayer, spec_of
from lowrank_pl.planning import make_plan

EVERYTHING = Targets(skip_first=False, skip_last=False)
ORDER = ("tucker2", SpatialSVD(), "svd")


class Net(nn.Module):
    """A convolution, a depthwise one, one along time, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(6, 24, 3), nn.Conv2d(24, 24, 5, groups=24)
        self.time, self.fc = nn.Conv1d(24, 24, 9, groups=2), nn.Linear(24, 10)

    def forward(self, x):
        return self.fc(self.time(self.depthwise(self.conv(x)).flatten(2)).mean(2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("order", [DECOMPOSITIONS, DECOMPOSITIONS[::-1], DECOMPOSITIONS[1:3]], ids=len)
def test_the_first_that_is_for_a_layer(order, name):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    supported = [d for d in order if supports(d, layer)]
    assert FirstOf(*order).candidates(spec) == tuple(supported[:1])
    assert (FirstOf(*order).unsupported(spec) is None) == bool(supported)


def test_it_is_a_value_made_of_names_and_objects():
    assert FirstOf("tucker2", SVD()) == FirstOf(Tucker2(), "svd") != FirstOf("svd", "tucker2")
    with pytest.raises(TypeError, match="structures to choose among"):
        FirstOf()
    with pytest.raises(ValueError, match="sdv"):
        FirstOf("svd", "sdv")


@pytest.mark.parametrize("method", [ORDER, list(ORDER), FirstOf(*ORDER), {"*": ORDER}], ids=lambda m: type(m).__name__)
def test_a_plan_settles_it(method):
    """Before any rule is asked, so that all of them, logs and checkpoints know one decomposition."""
    plan = make_plan(Net(), method, CompressionRatio(2.0), EVERYTHING)
    found = {c.name: c.method for c in plan.compressions}
    assert found == {"conv": Tucker2(), "depthwise": SpatialSVD(), "time": SVD(), "fc": SVD()}
    for c in plan.compressions:
        choice = Choice(c.method, (1,) * len(c.full))
        assert c.from_list(c.to_list(choice)) == choice


def test_what_no_member_is_for_says_why():
    plan = make_plan(Net(), ("tucker2", "spatial_svd"), CostPenalty(1.0, "params"), EVERYTHING)
    reason = "Tucker2 needs an ungrouped convolution, SpatialSVD needs a two-dimensional convolution"
    assert plan.dense == {"time": reason, "fc": reason}


def test_extraction():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 9)
    small = compress(Net(), (TiledSVD(4), "spatial_svd"), CompressionRatio(2.0), EVERYTHING, x)
    assert all(isinstance(layer, TiledLayer) for layer in (small.conv, small.time, small.fc))
    assert [stage.kernel_size for stage in small.depthwise] == [(5, 1), (1, 5)]


def test_callbacks_check_it_at_once():
    for make in (DeepTwist, lambda method: LearningCompression(1.0, method=method, l_step_epochs=1)):
        assert make(method=["tucker2", "svd"]).method == ["tucker2", "svd"]
        with pytest.raises(ValueError, match=r"Unknown `method` 'tucker3'"):
            make(method=["tucker3", "svd"])
        for bad in ([], ["svd", 3], [["svd"]]):
            with pytest.raises(TypeError, match="Expected"):
                make(method=bad)
    with pytest.raises(TypeError, match="`rank`"):
        DeepTwist(rank=["evbmf"])
