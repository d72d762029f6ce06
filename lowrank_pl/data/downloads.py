"""MNIST and CIFAR, as torchvision downloads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from lowrank_pl.data.image_arrays import ImageArrays

_MAY_DOWNLOAD = ContextVar("may_download", default=True)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Inside, what is absent is not downloaded: the place is somebody else's choice."""
    token = _MAY_DOWNLOAD.set(False)
    try:
        yield
    finally:
        _MAY_DOWNLOAD.reset(token)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MNIST(ImageArrays):
    """60,000 + 10,000 gray 28 x 28 digits (LeCun et al.), in [0, 1] and less the mean image.

    Read from `root`; downloaded to it if absent.
    """

    def __init__(self, root: str = "data", subtract_mean_image: bool = True, **kwargs: Any) -> None:
        super().__init__(subtract_mean_image=subtract_mean_image, **kwargs)
        self.root = root

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _load(datasets.MNIST, self.root)


class FashionMNIST(ImageArrays):
    """60,000 + 10,000 gray 28 x 28 pieces of clothing (Xiao et al., 2017), prepared like MNIST."""

    def __init__(self, root: str = "data", subtract_mean_image: bool = True, **kwargs: Any) -> None:
        super().__init__(subtract_mean_image=subtract_mean_image, **kwargs)
        self.root = root

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _load(datasets.FashionMNIST, self.root)


class CIFAR10(ImageArrays):
    """50,000 + 10,000 color 32 x 32 images of 10 classes (Krizhevsky, 2009), augmented.

    Normalized with ImageNet's mean and deviation, as the pre-trained networks of the papers expect.
    Read from `root`; downloaded to it if absent.
    """

    def __init__(
        self,
        root: str = "data",
        augment: bool = True,
        mean: Sequence[float] | None = _IMAGENET_MEAN,
        std: Sequence[float] | None = _IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, mean=mean, std=std, **kwargs)
        self.root = root

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _load(datasets.CIFAR10, self.root)


class CIFAR100(ImageArrays):
    """CIFAR10 with 100 classes."""

    def __init__(
        self,
        root: str = "data",
        augment: bool = True,
        mean: Sequence[float] | None = _IMAGENET_MEAN,
        std: Sequence[float] | None = _IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, mean=mean, std=std, **kwargs)
        self.root = root

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _load(datasets.CIFAR100, self.root)


def _load(dataset: Any, root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = _read(dataset, root, train=True), _read(dataset, root, train=False)
    return *_tensors(train), *_tensors(test)


def _read(dataset: Any, root: str, train: bool) -> Any:
    try:
        return dataset(root, train=train, download=False)
    except RuntimeError:  # torchvision: "Dataset not found or corrupted"
        pass
    if not _MAY_DOWNLOAD.get():
        raise ValueError(
            f"{dataset.__name__} is not in {root!r} (`data.root`), and would be downloaded to where a config from "
            "elsewhere says: give data.root=PATH"
        )
    try:
        return dataset(root, train=train, download=True)
    except Exception as error:  # whatever the network, the disk or a mirror has to say
        raise RuntimeError(
            f"{dataset.__name__} is not in {root!r} and could not be downloaded ({error}): set `data.root` "
            "to a folder that has it, or one that can be written, and try again with a network"
        ) from error


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
