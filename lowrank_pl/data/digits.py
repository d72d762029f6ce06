"""scikit-learn's handwritten digits."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from lowrank_pl.data.image_arrays import ImageArrays

_TEST_IMAGES = 360


class Digits(ImageArrays):
    """1,797 gray 8 x 8 digits that come with scikit-learn, by default enlarged to 32 x 32.

    360 of them, stratified and always the same, are the test set. Nothing is downloaded.
    """

    def __init__(self, size: int | None = 32, **kwargs: Any) -> None:
        super().__init__(size=size, **kwargs)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # values are 0 ... 16
        x_train, x_test, y_train, y_test = train_test_split(
            images, digits.target, test_size=_TEST_IMAGES, stratify=digits.target, random_state=0
        )
        return tuple(torch.as_tensor(array) for array in (x_train, y_train, x_test, y_test))  # type: ignore
