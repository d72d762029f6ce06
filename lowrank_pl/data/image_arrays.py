"""The data module of images that fit into memory."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lowrank_pl.checks import check_int, check_number
from lowrank_pl.data.image_set import ImageSet, as_images, channel_statistics, mean_image
from lowrank_pl.data.loader import ResumableLoader
from lowrank_pl.data.sampler import EpochSampler


class ImageArrays(LightningDataModule, ABC):
    """Training, validation and test images in memory, normalized and augmented batch by batch.

    After `setup()`: `input_shape` (C, H, W), `num_classes` and `fingerprint`, a digest of the images and labels as they
    were loaded. Subclasses say where the images come from.

    Arguments:
        val_fraction: the part of the training images that is held back for validation, in [0, 1). The same
            images for every `seed`. With 0 there is no validation.
        augment: flip and crop the training images.
        size: resize all images to `size` x `size`, once.
        mean, std: per channel, for images in [0, 1]; by default those of the training images.
        subtract_mean_image: instead of that, subtract the mean training image from images in [0, 1].
        seed: of the order of the training images.
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_fraction: float = 0.0,
        augment: bool = False,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        subtract_mean_image: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size, 1, "number of images")
        check_int("eval_batch_size", eval_batch_size, 1, "number of images")
        check_number("val_fraction", val_fraction, lambda x: 0 <= x < 1, "a share in [0, 1)")
        if size is not None:
            check_int("size", size, 1, "number of pixels")
        for each in std or ():
            check_number("std", each, lambda x: 0 < x < math.inf, "numbers above 0")
        if (mean is None) != (std is None) or (mean is not None and subtract_mean_image):
            raise ValueError(
                "give `mean` and `std`, or neither, and no `mean` beside `subtract_mean_image`; got "
                f"mean={mean}, std={std}, subtract_mean_image={subtract_mean_image}"
            )
        self.batch_size, self.eval_batch_size, self.val_fraction = batch_size, eval_batch_size, val_fraction
        self.augment, self.size, self.seed = augment, size, seed
        self.mean, self.std, self.subtract_mean_image = mean, std, subtract_mean_image
        self._train: ImageSet | None = None

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels: uint8 [N, H, W, C] or [N, H, W], int64 [N]."""

    def prepare_data(self) -> None:
        # on one process of each machine, before the others: what has to be downloaded is there when they load
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        x_train, y_train, x_test, y_test = self.load()
        self.fingerprint = _digest(x_train, y_train, x_test, y_test)
        x_train, x_test = as_images(x_train, self.size), as_images(x_test, self.size)
        train, val = _split(len(x_train), self.val_fraction)
        # without a validation set no copy: the images may be most of the memory
        held_back, labels = x_train[val], y_train[val]
        x_train, y_train = (x_train[train], y_train[train]) if len(val) else (x_train, y_train)
        mean, std = self._normalization(x_train)
        self._val = ImageSet(held_back, labels, mean, std)
        self._test = ImageSet(x_test, y_test, mean, std)
        self.input_shape = tuple(x_train.shape[1:])
        self.num_classes = int(max(y_train.max(), y_test.max())) + 1
        self._train = ImageSet(x_train, y_train, mean, std, augment=self.augment)

    def train_dataloader(self) -> DataLoader[Any]:
        self.setup()
        assert self._train is not None
        return _loader(self._train, EpochSampler(len(self._train), self.batch_size, True, self.seed))

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        self.setup()
        return self._eval_loader(self._val) if len(self._val) else []

    def test_dataloader(self) -> DataLoader[Any]:
        self.setup()
        return self._eval_loader(self._test)

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """The training images as they are: in their order, without augmentation."""
        self.setup()
        assert self._train is not None
        return self._eval_loader(replace(self._train, augment=False))

    def _eval_loader(self, images: ImageSet) -> DataLoader[Any]:
        return _loader(images, EpochSampler(len(images), self.eval_batch_size, shuffle=False))

    def _normalization(self, x_train: Tensor) -> tuple[Tensor, Tensor]:
        if self.subtract_mean_image:
            return mean_image(x_train), torch.ones(1)
        if self.mean is None or self.std is None:
            return channel_statistics(x_train)
        channels = x_train.shape[1]
        if {len(self.mean), len(self.std)} != {channels}:
            raise ValueError(
                f"`mean` and `std` must have {channels} numbers, one per channel, got {self.mean}, {self.std}"
            )
        return torch.tensor(list(self.mean))[:, None, None], torch.tensor(list(self.std))[:, None, None]


def _digest(*arrays: Tensor) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {list(array.shape)}".encode())
        digest.update(array.contiguous().numpy().data)
    return digest.hexdigest()


def _split(size: int, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices for training and for validation, in their old order."""
    held_back = round(size * val_fraction)
    if held_back == size or (val_fraction and not held_back):
        raise ValueError(f"`val_fraction` {val_fraction} of {size} training images leaves one of the sets empty")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[held_back:].sort().values, order[:held_back].sort().values


def _loader(images: ImageSet, sampler: EpochSampler) -> DataLoader[Any]:
    return ResumableLoader(
        images,
        sampler=sampler,
        batch_size=None,
        pin_memory=torch.cuda.is_available(),
        # a DataLoader draws a seed at every start: not from the global state, which is the augmentation's
        generator=torch.Generator(),
    )
