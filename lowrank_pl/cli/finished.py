"""The networks of a finished run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from lowrank_pl.checksums import is_signed, signature
from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.configs import read_stored
from lowrank_pl.cli.schema import check_config
from lowrank_pl.files import write_files
from lowrank_pl.models import load_weights
from lowrank_pl.reading import read_bytes
from lowrank_pl.run_files import check_links, read_facts
from lowrank_pl.runs import check_stored, stages_again
from lowrank_pl.storage import load_compressed


@dataclass(frozen=True)
class Finished:
    """Data, and both networks as they were trained and will be deployed."""

    directory: Path
    data: pl.LightningDataModule
    dense: nn.Module
    compressed: nn.Module
    memory_format: torch.memory_format

    @classmethod
    def open(cls, directory: Path, allow: Sequence[str]) -> Finished:
        """Raises `FileNotFoundError` or `ValueError` for what is no finished run, or not to be trusted."""
        path = directory.absolute()
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"no config.yaml in {path}: expected the directory of a run")
        check_links(path)
        facts = read_facts(path)
        if facts is None or facts["status"] != "finished":
            raise ValueError(f"{path} is not finished: `lowrank-pl resume` goes on with it")
        check_stored(path, facts)
        again, reason = stages_again(path, facts["done"])
        if again:
            raise ValueError(f"{reason}: `lowrank-pl resume` makes it anew")
        config = read_stored(path / "config.yaml")
        check_targets(config, allow)
        check_config(config)
        make = partial(instantiate, _convert_="all")
        data = make(config.data)
        data.setup()
        if facts.get("data") not in (None, getattr(data, "fingerprint", None)):
            warnings.warn(f"the data are not those that {path} was trained and tested on", stacklevel=2)
        dense = make(config.model.net, input_shape=data.input_shape, num_classes=data.num_classes)
        compressed = load_compressed(dense, path / "compressed")
        load_weights(dense, path / "dense.safetensors")
        memory = torch.channels_last if config.channels_last else torch.contiguous_format
        dense, compressed = (net.to(memory_format=memory).eval() for net in (dense, compressed))
        return cls(path, data, dense, compressed, memory)

    def images(self, size: int) -> Tensor:
        """The first test images [size, C, H, W]; all of them where there are fewer."""
        images: list[Tensor] = []
        for batch in self.data.test_dataloader():
            images.append(batch[0])
            if sum(map(len, images)) >= size:
                break
        return torch.cat(images)[:size]


def seal(file: Path) -> None:
    """Remember beside a file that this user has made it."""
    by = signature(file.read_bytes())
    if by is not None:
        write_files({_seal_file(file): by.encode()})


def is_sealed(file: Path) -> bool:
    """Whether this user has made the file, and nobody has changed it since."""
    place = _seal_file(file)
    return place.is_file() and is_signed(file.read_bytes(), read_bytes(place).decode(errors="replace"))


def _seal_file(file: Path) -> Path:
    return file.with_name(f".{file.name}.seal")
