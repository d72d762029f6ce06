"""The data module of images in folders, as ImageNet has them."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from lowrank_pl.checks import check_int, check_number
from lowrank_pl.data.loader import ResumableLoader
from lowrank_pl.data.sampler import ImageSampler


class ImageFolder(LightningDataModule):
    """`root/train/CLASS/*` and `root/val/CLASS/*`: files decoded by `workers` processes as they are needed.

    Training images are cropped at random and flipped, the others scaled and cropped in their middle, to
    `size` x `size`. `root/val` is the test set; `val_fraction` of the training images, always the same, are
    for validation. After `setup()`: `input_shape` (C, H, W), `num_classes` and `fingerprint`, a digest of the files'
    names and of a thousand of the files.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 256,
        eval_batch_size: int = 500,
        workers: int = 8,
        size: int = 224,
        val_fraction: float = 0.0,
        augment: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size, 1, "number of images")
        check_int("eval_batch_size", eval_batch_size, 1, "number of images")
        check_int("workers", workers, 0, "number of processes")
        check_int("size", size, 1, "number of pixels")
        check_number("val_fraction", val_fraction, lambda x: 0 <= x < 1, "a share in [0, 1)")
        for each in std:
            check_number("std", each, lambda x: 0 < x < math.inf, "numbers above 0")
        self.root, self.batch_size, self.eval_batch_size = root, batch_size, eval_batch_size
        self.workers, self.size, self.val_fraction, self.seed = workers, size, val_fraction, seed
        self.augment, self.mean, self.std = augment, list(mean), list(std)
        self._train: Subset[Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        augmented, plain = self._folder("train", self.augment), self._folder("train", False)
        self._test = self._folder("val", False)
        if augmented.classes != self._test.classes:
            raise ValueError(
                f"the classes (folders) of train/ and val/ in {self.root!r} (`data.root`) differ: "
                f"{sorted(set(augmented.classes) ^ set(self._test.classes))[:5]}"
            )
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
        held_back = round(len(plain) * self.val_fraction)
        self._val = Subset(plain, order[:held_back])
        self.input_shape, self.num_classes = (3, self.size, self.size), len(plain.classes)
        self.fingerprint = _digest(self.root, [file for file, _ in (*plain.samples, *self._test.samples)])
        self._train = Subset(augmented, order[held_back:])

    def train_dataloader(self) -> DataLoader[Any]:
        self.setup()
        assert self._train is not None
        return self._loader(self._train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        self.setup()
        return self._loader(self._val, self.eval_batch_size, shuffle=False) if len(self._val) else []

    def test_dataloader(self) -> DataLoader[Any]:
        self.setup()
        return self._loader(self._test, self.eval_batch_size, shuffle=False)

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """The training images scaled and cropped in their middle, in one order; the first ones are of all classes."""
        self.setup()
        assert self._train is not None
        images = Subset(self._folder("train", False), self._train.indices)
        return self._loader(images, self.eval_batch_size, shuffle=False)

    def _loader(self, images: Dataset[Any], batch_size: int, shuffle: bool) -> DataLoader[Any]:
        return ResumableLoader(
            images,
            batch_size,
            sampler=ImageSampler(images, batch_size, shuffle, self.seed),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def _folder(self, part: str, augment: bool) -> datasets.ImageFolder:
        folder = Path(self.root, part)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {str(folder)!r}: set `data.root` to a folder with train/CLASS and val/CLASS"
            )
        return datasets.ImageFolder(folder, self._transform(augment))

    def _transform(self, augment: bool) -> transforms.Compose:
        geometry: list[object] = [transforms.Resize(round(self.size * 256 / 224))]
        geometry.append(transforms.CenterCrop(self.size))
        if augment:
            geometry = [transforms.RandomResizedCrop(self.size), transforms.RandomHorizontalFlip()]
        return transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])


def _digest(root: str, files: Sequence[str]) -> str:
    """Of all names, and of the sizes, beginnings and ends of files at equal distances: all of them would take long."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0")
    for file in files[:: max(1, len(files) // 1000)]:
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(f"{size}".encode())
            for start in (0, max(0, size - 4096)):
                opened.seek(start)
                digest.update(opened.read(4096))
    return digest.hexdigest()
