"""Checkpoints from elsewhere, read within bounds."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.checksums import check_sum

_VALUES = 500_000  # in all lists and mappings of a checkpoint, those that are in several places counted in each
_DEPTH = 100
# What our checkpoints are made of. `torch.load` knows more, among it what takes as much memory as it is told to.
_MADE_OF = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(builtins|__builtin__) (set|complex|int|float|dict|list|tuple)|"
    r"torch (Size|device|\w+Storage|b?float\w+|double|half|u?int\w+|long|short|bool|complex\w+)|"
    r"torch\._utils _rebuild_(tensor_v2|parameter|parameter_with_state)|torch\.serialization _get_layout|"
    r"torch\.nn\.parameter Parameter"
)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint, without running what is in it, and in about the memory that the file has bytes.

    Raises `ValueError` for what is no checkpoint, is damaged, or would grow when it is read; other errors are those of
    `torch.load`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    check_sum(path)
    _check_zip(path)
    outline = torch.load(path, map_location="meta", weights_only=True)
    _check_sizes(outline, path.stat().st_size)
    checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    return checkpoint


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("it is compressed, which none of ours is")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("it would grow when it is read")
            if (broken := file.testzip()) is not None:  # which `torch.load` does not look at
                raise ValueError(f"{broken} in it is damaged")
            for part in parts:
                if part.filename.endswith(".pkl"):
                    _check_pickle(file.read(part))
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is no checkpoint ({error})") from error


def _check_pickle(text: bytes) -> None:
    """Raise `ValueError` where the pickle names something that no checkpoint of ours has. Runs nothing."""
    for operation, argument, _ in pickletools.genops(text):
        if operation.name == "GLOBAL" and not _MADE_OF.fullmatch(str(argument)):
            raise ValueError(f"it has a {str(argument).replace(' ', '.')!r:.100}, which none of ours has")
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it has the operation {operation.name}, which none of ours has")


def _check_sizes(outline: Any, size: int) -> None:
    """Of a checkpoint without its numbers: whether all values and tensors, written out, are of the file's size."""
    bytes_ = 0
    for values, value in enumerate(_all(outline, 0)):
        if isinstance(value, Tensor):
            wide = value.numel() * value.element_size()
            if wide > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor {list(value.shape)} in it has fewer numbers than places")
            bytes_ += wide
        if bytes_ > 4 * size or values > _VALUES:  # tied weights are in it once
            raise ValueError("it would grow when it is read")


def _all(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth > _DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _all(key, depth + 1)
            yield from _all(inner, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _all(inner, depth + 1)
