"""Loaders that go on in the middle of an epoch, against an uninterrupted one."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lowrank_pl.data import Digits, ImageFolder


def labels(loader) -> list[list[int]]:
    return [batch[1].tolist() for batch in loader]


@pytest.mark.parametrize("stop", [0, 1, 5, 10, 11])
def test_an_epoch_is_taken_up_where_it_stopped(stop: int) -> None:
    data = Digits(batch_size=128, val_fraction=0.1, seed=1)
    whole = data.train_dataloader()
    whole.sampler.set_epoch(3)
    expected = labels(whole)
    assert len(expected) == 11
    first = data.train_dataloader()
    first.sampler.set_epoch(3)
    batches = iter(first)
    seen = [next(batches)[1].tolist() for _ in range(stop)]
    state = first.state_dict()
    assert state == {"batches": stop % 11}
    other = data.train_dataloader()
    early = iter(other)  # as Lightning may, before it loads the state
    other.load_state_dict(state)
    other.sampler.set_epoch(3)
    assert seen + [batch[1].tolist() for batch in early] == expected + (expected if stop == 11 else [])
    assert labels(other) == expected  # the next one is whole


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folders_keep_their_order(workers: int, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in range(5):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (9, 9), (i, label, 0)).save(folder / f"{i}.png")
    make = lambda: ImageFolder(str(tmp_path), batch_size=3, workers=workers, size=8, seed=2).train_dataloader()  # noqa: E731
    expected = labels(make())
    assert len(expected) == 7
    assert expected != sorted(expected)
    loader = make()
    loader.load_state_dict({"batches": 4})
    assert labels(loader) == expected[4:]
    assert torch.equal(torch.tensor(labels(loader)[0]), torch.tensor(expected[0]))
