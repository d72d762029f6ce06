"""The papers' points, in the units of our reports: multiply-adds of the whole network for one image, all parameters,
error in percent. DeepTwist's are derived here from what its tables print."""

import csv
from importlib.resources import files

import pytest
import torch

from lowrank_pl.decompositions import TiledSVD
from lowrank_pl.models import VGG, CifarResNet
from lowrank_pl.planning import make_plan
from lowrank_pl.structures import Dense, total_macs
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import record

DEEPTWIST = "Lee et al. 2019 (DeepTwist)"
with files("lowrank_pl.overview").joinpath("published.csv").open(encoding="utf-8") as lines:
    ROWS = list(csv.DictReader(lines))


def points(group):
    """`{label: (macs, params, error)}` of the DeepTwist paper."""
    return {
        row["label"]: (float(row["macs"]), float(row["params"]), float(row["error"]))
        for row in ROWS
        if row["group"] == group and row["source"] == DEEPTWIST
    }


def counted(net):
    """Specs of all layers, and how many parameters are no weights of theirs."""
    net.eval()
    trace = record(net, torch.zeros(1, 3, 32, 32))
    plan = make_plan(net, TiledSVD(64), None, Targets(skip_first=False, skip_last=False), trace)
    specs = list(plan.specs.values())
    return specs, sum(p.numel() for p in net.parameters()) - sum(spec.num_weights for spec in specs)


def test_every_row_is_complete():
    assert len({(row["group"], row["label"], row["source"]) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert set(row) == {"group", "label", "source", "macs", "params", "error"}
        assert float(row["macs"]) > 1e4
        assert 0 < float(row["error"]) < 100


def test_deeptwist_resnet32():
    """Its Table 1 prints accuracies, tiles and ranks; nine layers of 64 to 64 channels are compressed."""
    specs, others = counted(CifarResNet(depth=32))
    expected = {"pre-trained": (sum(spec.macs for spec in specs), sum(s.num_weights for s in specs) + others, 92.63)}
    table = {(64, 16): 93.34, (32, 8): 93.11, (16, 4): 93.01, (8, 2): 93.23,
             (64, 8): 92.94, (32, 4): 92.97, (16, 2): 93.00, (8, 1): 92.81}  # fmt: skip
    for (tile, r), accuracy in table.items():
        large = [spec.operator_shape == (64, 64, 3, 3) for spec in specs]
        assert sum(large) == 9
        tiled = TiledSVD(tile)
        layouts = [tiled.layout(s, (r,)) if big else Dense(s) for s, big in zip(specs, large, strict=True)]
        macs = sum(total_macs(layout.stages) for layout in layouts)
        label = f"DeepTwist tiled SVD {tile} x {tile} r={r}"
        expected[label] = (macs, sum(layout.num_weights for layout in layouts) + others, accuracy)
    found = points("ResNet32 on CIFAR10")
    assert found.keys() == expected.keys()
    for label, (macs, params, accuracy) in expected.items():
        assert found[label] == (macs, params, pytest.approx(100 - accuracy))


def test_deeptwist_vgg19():
    """Its Table 2 prints weights and FLOPs of the convolutions with at least 128 inputs, in units of 2^20 and with two
    FLOPs per multiply-add. The others stay dense, and two of the three linear layers have an eighth of their weights.

    5.34 stands where the paper misprints 5.55 for r = 9. The FLOPs are the printed ones, up to 6 percent below those
    of the factors; ours are rounded to 10,000.
    """
    specs, others = counted(VGG(depth=19))
    large = [spec for spec in specs if spec.kind == "conv" and spec.in_channels >= 128]
    assert sum(spec.num_weights for spec in large) / 2**20 == pytest.approx(18.98, abs=0.005)
    assert 2 * sum(spec.macs for spec in large) / 2**20 == pytest.approx(647.87, abs=0.2)
    rest = [spec for spec in specs if spec not in large]
    saved = sum(7 / 8 * spec.num_weights for spec in rest if spec.kind == "linear" and spec.out_channels == 512)
    expected = {"pre-trained": (sum(spec.macs for spec in specs), sum(s.num_weights for s in specs) + others, 92.37)}
    table = {
        "Tucker R_c=0.6 conventional training": (9.14, 319.99, 91.97),
        "Tucker R_c=0.5 conventional training": (6.71, 235.74, 91.79),
        "Tucker R_c=0.45 conventional training": (5.49, 191.77, 91.36),
        "Tucker R_c=0.4 conventional training": (4.61, 161.60, 91.11),
        "DeepTwist tiled SVD 64 x 64 r=16": (9.49, 316.28, 92.42),
        "DeepTwist tiled SVD 64 x 64 r=11": (6.52, 214.25, 92.33),
        "DeepTwist tiled SVD 64 x 64 r=10": (5.93, 193.85, 92.23),
        "DeepTwist tiled SVD 64 x 64 r=9": (5.34, 173.44, 92.22),
        "DeepTwist tiled SVD 64 x 64 r=8": (4.74, 153.04, 92.07),
    }
    for label, (weights, flops, accuracy) in table.items():
        macs = flops * 2**19 + sum(spec.macs for spec in rest) - saved
        params = weights * 2**20 + sum(spec.num_weights for spec in rest) - saved + others
        expected[label] = (macs, params, accuracy)
    found = points("VGG19 on CIFAR10")
    assert found.keys() == expected.keys()
    for label, (macs, params, accuracy) in expected.items():
        assert found[label] == (
            pytest.approx(macs, abs=5001), pytest.approx(params, abs=5001), pytest.approx(100 - accuracy)
        )  # fmt: skip
