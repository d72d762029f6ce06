"""The CIFAR ResNets: names of the published files, shortcuts without weights, the published accuracy."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lowrank_pl.data import Arrays
from lowrank_pl.models import CifarResNet, load_weights
from lowrank_pl.models.resnet import BasicBlock

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA")


def test_names():
    names = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{key}" for key in BATCH_NORM)}
    for stage in (1, 2, 3):
        for block in range(5):
            prefix = f"layer{stage}.{block}"
            names |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight"}
            names |= {f"{prefix}.bn{i}.{key}" for i in (1, 2) for key in BATCH_NORM}
    assert set(CifarResNet(depth=32).state_dict()) == names


def test_option_a_shortcut():
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for i in range(3):
            for j in range(3):
                expected[:, channel + 2, i, j] = x[:, channel, 2 * i, 2 * j]
    assert torch.equal(block(x), expected)


def test_against_a_flat_program():
    torch.manual_seed(0)
    net, x = CifarResNet(depth=8).double(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    weights = dict(net.named_parameters())

    def normalized(x, name):
        return F.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    out = F.relu(normalized(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        stride, name = min(stage, 2), f"layer{stage}.0"
        inner = F.conv2d(out, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
        inner = F.relu(normalized(inner, f"{name}.bn1"))
        inner = normalized(F.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stage > 1:
            planes = inner.shape[1]
            out = F.pad(out[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4))
        out = F.relu(out + inner)
    expected = F.linear(F.avg_pool2d(out, 4).flatten(1), weights["linear.weight"], weights["linear.bias"])
    torch.testing.assert_close(net(x), expected)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with cifar10.npz")
def test_published_accuracy():
    folder = Path(SHARED_DATA)
    net = CifarResNet(depth=32).eval()
    load_weights(net, folder / "resnet32-cifar10.safetensors")
    data = Arrays(file=str(folder / "cifar10.npz"), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.no_grad():
        correct = sum((net(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    assert correct == 9263
