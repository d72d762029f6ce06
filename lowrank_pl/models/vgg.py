"""VGG (Simonyan & Zisserman, ICLR 2015), batch-normalized, for CIFAR."""

from collections.abc import Sequence

from torch import Tensor, nn

_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # per stage
_PLANES = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Convolutions with batch norm, then linear layers 512-512-512-`num_classes` with dropout.

    For 3 x 32 x 32 images: 15.240 M weights and 313.73 M MACs (depth 16), 20.548 M and 398.66 M (depth 19).
    Takes [N, C, H, W], gives logits [N, num_classes]. Raises ValueError for images below 32 x 32.
    """

    def __init__(
        self,
        depth: int = 16,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"`depth` must be one of {list(_CONVOLUTIONS)}, got {depth}")
        channels, height, width = input_shape
        if min(height, width) < 32:
            raise ValueError(f"VGG needs images of 32 x 32 or more, got {height} x {width}: resize them (`data.size`)")
        self.features = _features(channels, _CONVOLUTIONS[depth])
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(512 * (height // 32) * (width // 32), 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


def _features(channels: int, convolutions: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for count, planes in zip(convolutions, _PLANES, strict=True):
        for _ in range(count):
            convolution = nn.Conv2d(channels, planes, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(planes), nn.ReLU()]
            channels = planes
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
