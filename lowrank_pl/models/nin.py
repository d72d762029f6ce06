"""Network in network (Lin et al., ICLR 2014), batch-normalized, for CIFAR."""

from collections.abc import Sequence

from torch import Tensor, nn


class NIN(nn.Module):
    """Three blocks of one wide and two 1 x 1 convolutions: 0.9656 M weights, 222.49 M MACs for 3 x 32 x 32.

    Takes [N, C, H, W], gives logits [N, num_classes].
    """

    def __init__(self, input_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(input_shape[0], 192, 5),
            *_convolution(192, 160, 1),
            *_convolution(160, 96, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Dropout(dropout),
            *_convolution(96, 192, 5),
            *_convolution(192, 192, 1),
            *_convolution(192, 192, 1),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Dropout(dropout),
            *_convolution(192, 192, 3),
            *_convolution(192, 192, 1),
            nn.Conv2d(192, num_classes, 1),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.features(x).mean((2, 3))
        return y


def _convolution(channels: int, planes: int, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, planes, kernel, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(planes), nn.ReLU()
