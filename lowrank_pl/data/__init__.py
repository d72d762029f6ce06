"""Images for training: whole sets in memory, or folders of files."""

from lowrank_pl.data.arrays import Arrays
from lowrank_pl.data.digits import Digits
from lowrank_pl.data.downloads import CIFAR10, CIFAR100, MNIST, FashionMNIST
from lowrank_pl.data.image_arrays import ImageArrays
from lowrank_pl.data.image_folder import ImageFolder
from lowrank_pl.data.image_set import ImageSet
from lowrank_pl.data.sampler import EpochSampler

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Arrays",
    "Digits",
    "EpochSampler",
    "FashionMNIST",
    "ImageArrays",
    "ImageFolder",
    "ImageSet",
]
