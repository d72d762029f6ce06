"""Which images are in which batch."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lowrank_pl.processes import place


class EpochSampler(DistributedSampler[Any]):
    """The batches of one epoch, each an int64 tensor of up to `batch_size` indices below `size`.

    The order is a function of (`seed`, epoch) and of nothing else, so an epoch can be taken up in its middle.
    Every process draws its own share: `rank` of `world_size`, by default those of torch.distributed. Shares
    have one length; where `size` is no multiple of `world_size`, a few indices come twice.

    A DistributedSampler so that Lightning leaves it in place and calls `set_epoch`. It yields batches because
    Lightning does not look for `set_epoch` behind a BatchSampler that is the `sampler` of a DataLoader.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if size < 1 or batch_size < 1:
            raise ValueError(f"`size` and `batch_size` must be 1 or more, got {size} and {batch_size}")
        if (rank is None) != (world_size is None):
            raise ValueError(f"`rank` and `world_size` come together, got {rank} and {world_size}")
        if rank is None:
            rank, world_size = place()
        super().__init__(range(size), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.size, self.batch_size = size, batch_size
        self.first_batch = 0  # of the next epoch that is drawn: those before it have been served already

    def __len__(self) -> int:
        """Batches per epoch of this process."""
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # a generator, so that nothing is drawn before the first batch: Lightning makes a fit's first iterator
        # before it calls `set_epoch`
        yield from self.indices().split(self.batch_size)[self.first_batch :]

    def indices(self) -> Tensor:
        """This process's share of the epoch: int64 [num_samples]."""
        order = torch.arange(self.size)
        if self.shuffle:
            # hashed, because a sum would make epoch 1 of seed 0 epoch 0 of seed 1
            hashed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(int(hashed[0])))
        return order[torch.arange(self.rank, self.total_size, self.num_replicas) % self.size]


class ImageSampler(DistributedSampler[Any]):
    """The images of one epoch, one index each, for a loader of `batch_size`; an epoch can be taken up in its middle."""

    def __init__(self, images: Dataset[Any], batch_size: int, shuffle: bool, seed: int) -> None:
        rank, world_size = place()
        super().__init__(images, world_size, rank, shuffle, seed)
        self.batch_size, self.first_batch = batch_size, 0

    def __iter__(self) -> Iterator[int]:
        yield from list(super().__iter__())[self.first_batch * self.batch_size :]
