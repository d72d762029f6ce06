"""Images from a file of numpy arrays."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from lowrank_pl.data.image_arrays import ImageArrays

_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Arrays(ImageArrays):
    """An .npz file with `x_train`, `y_train`, `x_test`, `y_test`: your own images.

    Images are uint8 [N, H, W, C] or [N, H, W], labels integers [N] from 0. Raises FileNotFoundError, or
    ValueError for anything else, at `setup()`.
    """

    def __init__(self, file: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = file

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_train, y_train, x_test, y_test = self._read()
        self._check("train", x_train, y_train)
        self._check("test", x_test, y_test)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise self._wrong(f"images of one size in both sets, got {x_train.shape[1:]} and {x_test.shape[1:]}")
        labels = [torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test)]
        return torch.from_numpy(x_train), labels[0], torch.from_numpy(x_test), labels[1]

    def _read(self) -> list[np.ndarray]:
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"no file {self.file!r}: set `data.file` to an .npz with {', '.join(_KEYS)}")
        try:
            arrays: Any = np.load(self.file, allow_pickle=False)  # a pickle in a file from elsewhere runs code
            names = sorted(arrays)
            missing = [key for key in _KEYS if key not in names]
            if not missing:
                return [arrays[key] for key in _KEYS]
        except (ValueError, OSError, EOFError, BadZipFile, TypeError) as error:
            raise self._wrong(f"an .npz of plain arrays ({error})") from error
        raise self._wrong(f"arrays {', '.join(_KEYS)}; {', '.join(missing)} not among {', '.join(names)}")

    def _check(self, part: str, x: np.ndarray, y: np.ndarray) -> None:
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise self._wrong(f"x_{part} as uint8 [N, H, W, C] or [N, H, W], got {x.dtype} {list(x.shape)}")
        if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
            raise self._wrong(f"y_{part} as integers [N], got {y.dtype} {list(y.shape)}")
        if len(x) != len(y) or not len(x):
            raise self._wrong(f"as many labels as images, got {len(x)} in x_{part} and {len(y)} in y_{part}")
        if y.min() < 0:
            raise self._wrong(f"labels from 0 in y_{part}, got {y.min()}")

    def _wrong(self, expected: str) -> ValueError:
        return ValueError(f"{self.file!r} (`data.file`): expected {expected}")
