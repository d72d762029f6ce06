"""Images in memory, handed out batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_pl.data.augment import flip_and_crop


@dataclass(eq=False)
class ImageSet(Dataset[Any]):
    """Images uint8 [N, C, H, W] with labels int64 [N], normalized to `(image / 255 - mean) / std`.

    An item is a batch, `set[indices]`: float32 [B, C, H, W] and int64 [B]. For a DataLoader with
    `batch_size=None` and a sampler that yields indices of batches. `mean` and `std` broadcast to [C, H, W].
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    augment: bool = False

    def __post_init__(self) -> None:
        self._shift, self._scale = self.mean * 255, 1 / (self.std * 255)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        which = torch.as_tensor(indices)
        if which.ndim != 1:
            raise TypeError(
                f"expected the list of a batch's indices, got {indices!r}: give the DataLoader an "
                "EpochSampler and batch_size=None. The Trainer's `overfit_batches` takes the sampler away: "
                "leave it at 0"
            )
        images = self.images.index_select(0, which)  # faster than `images[which]`
        if self.augment:
            images = flip_and_crop(images)
        return images.float().sub_(self._shift).mul_(self._scale), self.labels[which]


def as_images(array: Tensor, size: int | None = None) -> Tensor:
    """uint8 [N, H, W, C] or [N, H, W] as [N, C, H, W], resized to `size` x `size` where that is given."""
    images = (array.unsqueeze(1) if array.ndim == 3 else array.permute(0, 3, 1, 2)).contiguous()
    if size is None or images.shape[-2:] == (size, size):
        return images
    return torch.cat([_resized(chunk, size) for chunk in images.split(1000)])


def _resized(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of images [N, C, H, W], of range [0, 1]: two [C, 1, 1]."""
    # counts of the 256 values: exact, and without a float copy of all images
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp(min=0).sqrt()
    return mean.float()[:, None, None], std.clamp(min=1e-6).float()[:, None, None]


def mean_image(images: Tensor) -> Tensor:
    """The mean [C, H, W] of images uint8 [N, C, H, W], of range [0, 1]."""
    return (images.sum(0, dtype=torch.int64).double() / (255 * len(images))).float()
