"""Layers as structures over ranks, counted and timed: against PyTorch's own counter."""

import csv
import io
import time
from functools import partial

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, finals, make_layer, spec_on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import SVD, SpatialSVD, TiledSVD
from lowrank_pl.decompositions import Decomposition, LowRankPlusSparse, TensorTrain
from lowrank_pl.figures import draw_speedups
from lowrank_pl.models import CifarResNet
from lowrank_pl.speedups import (
    MOST,
    Conditions,
    Shape,
    decompositions_named,
    kernel_of,
    measure,
    pairs_of,
    shapes_of,
    size_of,
    some_ranks,
    to_csv,
)
from lowrank_pl.timing import times_ms

IMAGES = torch.randn(2, 3, 16, 16)
QUICK = Conditions(seconds=0.005, rounds=3)


def test_all_decompositions_are_found_by_themselves():
    found = decompositions_named()
    assert {type(each) for each in found.values()} >= set(finals(Decomposition))
    assert list(decompositions_named(["tucker2", "svd"])) == ["tucker2", "svd"]
    with pytest.raises(ValueError, match=r"Expected `structures` to be some of .*svd.* but got 'svdd'"):
        decompositions_named(["svd", "svdd"])


def test_equal_layers_are_one_shape_and_the_most_costly_come_first():
    net = CifarResNet(depth=20, input_shape=(3, 16, 16))
    shapes = shapes_of(net, IMAGES)
    assert sum(len(shape.names) for shape in shapes) == 20
    totals = [shape.macs * len(shape.names) for shape in shapes]
    assert totals == sorted(totals, reverse=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(IMAGES[:1])
    assert 2 * sum(totals) == counter.get_total_flops()
    assert {shape.names[0]: len(shape.names) for shape in shapes}["layer1.0.conv1"] == 6
    (head,) = shapes_of(net, IMAGES, ["linear"])
    assert (head.bias, head.layer.kernel) == (True, ())
    with pytest.raises(ValueError, match=r"Pattern 'conv9' in `layers` matches no linear layer"):
        shapes_of(net, IMAGES, ["conv9"])


def test_layers_that_never_run_are_left_out():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    assert [shape.names for shape in shapes_of(Idle(), IMAGES)] == [("conv",)]
    with pytest.raises(ValueError, match="None of the layers that match 'idle' run"):
        shapes_of(Idle(), IMAGES, ["idle"])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS, ids=lambda x: str(x).replace(" ", ""))
def test_ranks_are_spread_over_the_multiply_adds(decomposition):
    """The largest ones with so many times fewer of them, by trying all."""
    spec = spec_on(nn.Conv2d(64, 64, 3, padding=1), torch.zeros(1, 64, 16, 16))
    if decomposition.unsupported(spec):
        spec = spec_on(nn.Linear(12, 10), torch.zeros(1, 12)).with_(inputs=((1,),))
    if decomposition.unsupported(spec):
        pytest.skip("of one shape alone")
    steps = min(max(decomposition.full_rank(spec)), 4096)
    ranks = dict.fromkeys(decomposition.at_fraction(spec, (i + 1) / steps) for i in range(steps))
    macs = {rank: decomposition.layout(spec, rank).of_factors().macs for rank in ranks}
    allowed = [[r for r, count in macs.items() if count <= spec.macs / MOST ** (i / 5)] for i in range(6)]
    found = some_ranks(decomposition, spec, 6)
    if isinstance(decomposition, LowRankPlusSparse):  # what one part does not use up the other gets: nearly the largest
        assert len(found) == 6
        most = [max(macs[rank] for rank in ranks) for ranks in allowed]
        assert all(0.9 * m <= macs[rank] <= m for m, rank in zip(most, found, strict=True))
        return
    expected = sorted({ranks[-1] for ranks in allowed if ranks}, reverse=True)
    assert found == expected
    if not isinstance(decomposition, TiledSVD | TensorTrain):
        assert len(expected) >= 4


def test_a_layer_that_cannot_be_cheaper_has_no_ranks():
    spec = spec_on(nn.Conv2d(1, 4, 1), torch.zeros(1, 1, 8, 8))
    assert some_ranks(SVD(), spec, 6) == []
    assert pairs_of([Shape(("a",), spec, True)], {"svd": SVD(), "spatial_svd": SpatialSVD()}, 6) == []


@pytest.mark.parametrize("name", ["conv2d_grouped", "transposed2d_strides", "linear_tokens", "conv3d"])
def test_what_is_timed_is_what_is_counted(name):
    layer, x = make_layer(name)
    shape = Shape((name,), spec_on(layer, x), layer.bias is not None)
    pairs = pairs_of([shape], decompositions_named(), 3)
    assert pairs
    for shape, structure, layouts, ranks in pairs:
        for each, layout in zip(measure(shape, structure, layouts, ranks, QUICK), layouts, strict=True):
            module = layout.build(shape.bias)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x[:1].float())
            assert 2 * each.macs == counter.get_total_flops()
            bias = layer.out_channels if name != "linear_tokens" else 0
            assert each.params == sum(p.numel() for p in module.parameters()) - bias
            assert each.theoretical == shape.macs / each.macs
            assert each.quartiles[0] <= each.measured <= each.quartiles[1]


def test_measured_is_how_many_times_faster():
    """Of a layer against one with 32 times fewer channels inside, on so many inputs that nothing else counts."""
    spec = spec_on(nn.Linear(1024, 1024), torch.zeros(1, 1024)).with_(inputs=((256,),))
    shape = Shape(("big",), spec, False)
    (fast,) = measure(shape, "svd", [SVD().layout(spec, (4,))], [(4,)], Conditions(seconds=0.1, rounds=5))
    assert fast.theoretical == 128
    assert fast.measured > 3
    assert fast.seconds < fast.dense_seconds


def test_times_are_told_round_by_round():
    slow, fast = times_ms([partial(time.sleep, 0.02), partial(time.sleep, 0.001)], seconds=0.05, rounds=4)
    assert (len(slow), len(fast)) == (4, 4)
    assert min(slow) >= 20
    assert 1 <= min(fast) < 20


def some(points=3):
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(1))
    pairs = pairs_of(shapes_of(net, IMAGES), {"svd": SVD(), "spatial_svd": SpatialSVD()}, points)
    return [each for pair in pairs for each in measure(*pair, QUICK)]


def test_the_table():
    found = some()
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert list(rows[0]) == [
        "layer", "kernel", "in", "out", "size", "structure", "rank", "params", "macs", "macs_speedup", "seconds_dense",
        "seconds", "speedup", "speedup_q25", "speedup_q75", "layers",
    ]  # fmt: skip
    assert len(rows) == len(found)
    for row, each in zip(rows, found, strict=True):
        assert float(row["macs_speedup"]) == pytest.approx(each.shape.macs / int(row["macs"]), rel=1e-3)
        assert float(row["speedup_q25"]) <= float(row["speedup"]) <= float(row["speedup_q75"])
    strided = next(row for row in rows if row["layer"] == "2")
    assert (strided["kernel"], strided["in"], strided["out"], strided["size"]) == ("3x3 /2", "16", "16", "12x12")


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_has_words(name):
    layer, x = make_layer(name)
    assert kernel_of(spec_on(layer, x))
    assert size_of(spec_on(layer, x))[0].isdigit()


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_figure(count, tmp_path):
    found = some(2)
    shapes = [Shape((f"layer{i}",), found[0].shape.layer.with_(out_channels=i + 1), True) for i in range(count)]
    rows = [type(found[0])(shape, *list(vars(each).values())[1:]) for shape in shapes for each in found[:2]]
    draw_speedups(rows, "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="`batch` to be an int of at least 1 but got 0"):
        Conditions(batch=0)
    with pytest.raises(ValueError, match="`seconds` to be above 0 but got -1"):
        Conditions(seconds=-1)
