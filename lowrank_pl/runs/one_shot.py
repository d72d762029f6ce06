"""Compression before any training, or without one, in a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.checks import check_among, check_int
from lowrank_pl.methods.from_scratch import check_rules
from lowrank_pl.methods.reconstruct import Mode
from lowrank_pl.one_shot import MetricName, compress, from_scratch
from lowrank_pl.planning import MethodChoice, RankChoice, rules_of
from lowrank_pl.samples import Samples
from lowrank_pl.targets import Targets

Initialize: TypeAlias = Literal["weights", "variance"]

_LARGEST = 100  # images of a batch


@final
@dataclass(frozen=True)
class OneShot:
    """What `compress` makes of a network, on the first `samples` training images, `places` positions of each; with
    `train` its factors are trained then. The other arguments are those of `compress`, or, with `initialize="variance"`,
    of `from_scratch`.

    A sixth more images measure errors. Without `train` images are looked at in any case, with it only where what is
    asked for needs them. `initialize` None waits for `settled`, which knows whether the network has been trained.
    """

    method: MethodChoice = "tiled_svd"
    rank: RankChoice | None = None
    targets: Targets | None = None
    metric: MetricName = "weights"
    reconstruct: Mode | None = None
    samples: int = 3000
    places: int | None = 10
    recalibrate_bn: bool = False
    train: bool = False
    initialize: Initialize | None = "weights"
    norm_between: bool = False

    def __post_init__(self) -> None:
        check_among("metric", self.metric, get_args(MetricName))
        check_among("reconstruct", self.reconstruct, (*get_args(Mode), None))
        check_int("samples", self.samples, 1, "number of images")
        if self.places is not None:
            check_int("places", self.places, 1, "number of positions")
        for name in ("recalibrate_bn", "train", "norm_between"):
            check_among(name, getattr(self, name), (True, False))
        check_among("initialize", self.initialize, (*get_args(Initialize), None))
        if self.initialize == "variance":
            check_rules(rules_of(self.rank))
        if self.initialize == "variance" and self.needs_images:
            raise ValueError(
                "Expected `train` true, `metric` 'weights', and neither `reconstruct` nor `recalibrate_bn`, where "
                "`initialize` is 'variance': random factors are fitted to nothing"
            )
        if self.initialize == "weights" and self.norm_between:
            raise ValueError(
                "Expected `norm_between` false where factors are those of the network's weights: norms would change "
                "what they compute. Train from scratch for it: initialize='variance', reference=none"
            )

    def settled(self, trained: bool) -> OneShot:
        """With random factors where the network's weights are random and nothing is fitted to them, if `initialize` is
        None. Raises `ValueError` for trained weights that would be thrown away."""
        if self.initialize == "variance" and trained:
            raise ValueError(
                "Expected neither a reference nor weights where `initialize` is 'variance', which starts from random "
                "factors: set reference=none and no model.weights, or initialize='weights'"
            )
        if self.initialize is not None:
            return self
        scratch = not trained and not self.needs_images
        return replace(self, initialize="variance" if scratch else "weights")

    @property
    def needs_images(self) -> bool:
        return not self.train or self.metric != "weights" or self.reconstruct is not None or self.recalibrate_bn

    def __call__(
        self, module: nn.Module, example: Tensor, images: Callable[[], Iterable[Any]], check: Callable[[], None]
    ) -> nn.Module:
        """A compressed copy of a classifier. `images` makes a loader of batches (images, labels), `check` may raise
        what ends it early. Raises `ValueError` with the key."""
        if self.initialize == "variance":
            try:
                return from_scratch(
                    module, self.method, self.rank, self.targets, example, norm_between=self.norm_between
                )
            except ValueError as error:
                raise ValueError(f"`compression`: {error}") from error
        samples = None
        if self.needs_images:
            size = math.ceil(self.samples / max(10, math.ceil(self.samples / _LARGEST)))
            samples = Samples(_Batches(images(), size, check), self.samples, self.places, loss=_loss)
        with warnings.catch_warnings(record=True) as caught:
            try:
                small = compress(
                    module, self.method, self.rank, self.targets, example, data=samples, reconstruct=self.reconstruct,
                    metric=self.metric, recalibrate_bn=self.recalibrate_bn,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"`compression`: {error}") from error
        few = [warning for warning in caught if "Give more data" in str(warning.message)]
        for warning in caught:
            if warning not in few[1:]:  # of every layer, where they are fitted one by one
                key = "`reconstruct.samples`, `reconstruct.places`: " if warning in few else ""
                warnings.warn(f"{key}{warning.message}", warning.category, stacklevel=2)
        return small


@dataclass(frozen=True)
class _Batches:
    """The images of a loader, so many at a time."""

    loader: Iterable[Any]
    size: int
    check: Callable[[], None]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left: tuple[Tensor, Tensor] | None = None
        for pair in self.loader:
            images, labels = pair if left is None else map(torch.cat, zip(left, pair, strict=True))
            whole = len(images) // self.size * self.size
            for batch in zip(images[:whole].split(self.size), labels[:whole].split(self.size), strict=True):
                self.check()
                yield batch
            left = images[whole:], labels[whole:]
        if left is not None and len(left[0]):
            yield left


def _loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)
