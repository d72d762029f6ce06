"""The ResNets for CIFAR-10 of He et al. (CVPR 2016, section 4.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 with shortcuts without weights (He et al., option A).

    Takes [N, C, H, W], gives logits [N, num_classes]. Parameter names are those of the pre-trained networks
    in akamaster/pytorch_resnet_cifar10: `conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`.
    """

    def __init__(self, depth: int = 20, input_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"`depth` must be 6n + 2, as 20, 32, 44, 56 or 110, got {depth}")
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, with zeros for the new channels."""
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    later = [BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_planes, planes, stride), *later)
