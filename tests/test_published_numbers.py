"""Projecting pre-trained networks without training: the accuracies that DeepTwist starts from."""

import os
from pathlib import Path

import pytest
import torch

from lowrank_pl import CompressionRatio, Targets, TiledSVD, compress
from lowrank_pl.data import Arrays
from lowrank_pl.models import CifarResNet, load_weights

SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA", "")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with cifar10.npz")
@pytest.mark.parametrize(
    ("depth", "ratio", "min_channels", "expected"),
    [(20, 4.0, 0, 14.0), (32, 2.0, 64, 85.4)],  # measured in a bare PyTorch loop, independently of this package
)
def test_projected_without_training(depth: int, ratio: float, min_channels: int, expected: float) -> None:
    folder = Path(SHARED_DATA)
    net = CifarResNet(depth=depth).eval()
    load_weights(net, folder / f"resnet{depth}-cifar10.safetensors")
    targets = Targets(types=["Conv2d"], min_channels=min_channels)
    small = compress(net, TiledSVD(64), CompressionRatio(ratio), targets)
    data = Arrays(file=str(folder / "cifar10.npz"), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.no_grad():
        correct = sum((small(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    assert correct / 100 == pytest.approx(expected, abs=0.5)
