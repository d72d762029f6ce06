"""The two LeNets of Idelbayev & Carreira-Perpinan (CVPR 2020), for MNIST."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300(nn.Module):
    """Two hidden layers, of 300 and 100 units, with tanh: 266,200 weights for 28 x 28 images.

    Takes [N, C, H, W] or anything else with `C H W` numbers per image; gives logits [N, num_classes].
    """

    def __init__(self, input_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        self.fc1 = nn.Linear(math.prod(input_shape), 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x.flatten(1)))
        y: Tensor = self.fc3(torch.tanh(self.fc2(x)))
        return y


class LeNet5(nn.Module):
    """Caffe's LeNet5 with ReLU and dropout: 430,500 weights and 2.293 M MACs for 28 x 28 images.

    Takes [N, C, H, W], gives logits [N, num_classes]. Raises ValueError for images below 16 x 16.
    """

    def __init__(self, input_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 16:
            raise ValueError(
                f"LeNet5 needs images of 16 x 16 or more, got {height} x {width}: resize them (`data.size`)"
            )
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * _after_convolutions(height) * _after_convolutions(width), 500)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        y: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))
        return y


def _after_convolutions(size: int) -> int:
    return ((size - 4) // 2 - 4) // 2
