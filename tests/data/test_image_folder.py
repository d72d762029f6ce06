"""Images in folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_pl.data import ImageFolder


@pytest.fixture
def root(tmp_path):
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_loaders(root):
    data = ImageFolder(str(root), batch_size=4, eval_batch_size=5, workers=0, size=32, val_fraction=0.25)
    data.setup()
    assert (data.input_shape, data.num_classes) == ((3, 32, 32), 2)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [4, 1, 2]
    x, y = next(iter(loaders[0]))
    assert (x.shape, y.shape, y.dtype) == ((4, 3, 32, 32), (4,), torch.int64)
    assert sorted(torch.cat([y for _, y in loaders[2]]).tolist()) == [0, 0, 0, 1, 1, 1]


def test_training_and_validation_images_are_apart(root):
    data = ImageFolder(str(root), workers=0, size=32, val_fraction=0.25, seed=1)
    data.setup()
    assert sorted([*data._train.indices, *data._val.indices]) == list(range(20))
    other = ImageFolder(str(root), workers=0, size=32, val_fraction=0.25, seed=2)
    other.setup()
    assert other._val.indices == data._val.indices


def test_only_training_images_are_augmented(root):
    data = ImageFolder(str(root), batch_size=20, workers=0, size=32, val_fraction=0.25)
    (first,), (again,) = ([x for x, _ in data.train_dataloader()] for _ in range(2))
    assert not torch.equal(first, again)
    (first,), (again,) = ([x for x, _ in data.val_dataloader()] for _ in range(2))
    assert torch.equal(first, again)


def test_training_images_as_they_are_come_in_one_order_and_of_all_classes(root):
    data = ImageFolder(str(root), eval_batch_size=15, workers=0, size=32, val_fraction=0.25)
    ((x, y),), ((again, _),) = (list(data.train_eval_dataloader()) for _ in range(2))
    assert torch.equal(x, again)
    plain = data._folder("train", False)
    for image, label, index in zip(x, y, data._train.indices, strict=True):
        assert label == plain[index][1]
        assert torch.equal(image, plain[index][0])
    assert len(set(y[:6].tolist())) == 2


def test_no_validation(root):
    assert ImageFolder(str(root), workers=0).val_dataloader() == []


def test_bad_folders(root):
    with pytest.raises(FileNotFoundError, match=r"absent/train'?: set `data.root`"):
        ImageFolder(str(root / "absent")).setup()
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ValueError, match=r"differ: \['dog', 'wolf'\]"):
        ImageFolder(str(root)).setup()


def test_bad_arguments():
    with pytest.raises(ValueError, match="`val_fraction`"):
        ImageFolder("here", val_fraction=1.5)
    with pytest.raises(ValueError, match="`workers`"):
        ImageFolder("here", workers=-1)


def test_the_fingerprint_is_of_names_and_contents(root, tmp_path_factory):
    def fingerprint(folder):
        data = ImageFolder(str(folder), workers=0, size=32)
        data.setup()
        return data.fingerprint

    first = fingerprint(root)
    moved = root.rename(tmp_path_factory.mktemp("moved") / "images")
    assert fingerprint(moved) == first
    file = moved / "val" / "dog" / "2.png"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(moved) != first
