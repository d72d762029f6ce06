"""The data module of images in memory."""

import numpy as np
import pytest
import torch

from lowrank_pl.data import Digits, ImageArrays


class Small(ImageArrays):
    loads = 0

    def load(self):
        self.loads += 1
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (120, 6, 6, 3), generator=generator, dtype=torch.uint8)
        y = torch.arange(120) % 4
        return x[:100], y[:100], x[100:], y[100:]


def all_of(loader):
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def test_loaders():
    data = Small(batch_size=16, eval_batch_size=9, val_fraction=0.2)
    data.setup()
    assert data.input_shape == (3, 6, 6)
    assert data.num_classes == 4
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [5, 3, 3]
    assert [len(all_of(loader)[1]) for loader in loaders] == [80, 20, 20]
    assert [len(y) for _, y in loaders[0]] == [16] * 5


def test_setup_once():
    data = Small()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    data.train_dataloader()
    assert data.loads == 1


def test_no_validation():
    assert Small().val_dataloader() == []


def test_validation_images_do_not_depend_on_the_seed():
    sets = [Small(val_fraction=0.3, seed=seed, mean=[0] * 3, std=[1] * 3) for seed in (0, 1)]
    (val, _), (other, _) = (all_of(data.val_dataloader()) for data in sets)
    assert torch.equal(val, other)
    train, _ = all_of(sets[0].train_dataloader())
    images = torch.cat([train, val]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 100


def test_seed_changes_the_order():
    first, same, other = (all_of(Small(seed=seed).train_dataloader())[1] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_normalized_by_the_training_images():
    x, _ = all_of(Small(val_fraction=0.2).train_dataloader())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_mean_image():
    data = Small(subtract_mean_image=True)
    x, _ = all_of(data.train_dataloader())
    torch.testing.assert_close(x.mean(0), torch.zeros(3, 6, 6), atol=1e-5, rtol=0)
    test, _ = all_of(data.test_dataloader())
    images = data.load()[2].permute(0, 3, 1, 2).float() / 255
    expected = images - data.load()[0].permute(0, 3, 1, 2).double().mean(0).float() / 255
    torch.testing.assert_close(test, expected, atol=1e-5, rtol=0)


def test_augments_only_the_training_images():
    data = Small(augment=True, val_fraction=0.5, mean=[0] * 3, std=[1] * 3)
    assert (all_of(data.train_dataloader())[0] == 0).float().mean() > 0.2
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert (all_of(loader)[0] == 0).float().mean() < 0.05


def test_loaders_leave_the_global_random_state_alone():
    data, state = Small(), torch.get_rng_state()
    all_of(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be a number of images of at least 1 but got 0"),
        ({"eval_batch_size": 1.5}, "`eval_batch_size` to be a number of images of at least 1 but got 1.5"),
        ({"val_fraction": 1.0}, r"`val_fraction` to be a share in \[0, 1\) but got 1.0"),
        ({"size": 0}, "`size` to be a number of pixels of at least 1 but got 0"),
        ({"mean": [0.5], "std": [0.0]}, "`std` to be numbers above 0 but got 0.0"),
        ({"mean": [0.5]}, "give `mean` and `std`, or neither"),
        ({"mean": [0.5], "std": [0.5], "subtract_mean_image": True}, "no `mean` beside"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Small(**arguments)


def test_bad_for_these_images():
    with pytest.raises(ValueError, match=r"must have 3 numbers, one per channel, got \[0.5\], \[0.5\]"):
        Small(mean=[0.5], std=[0.5]).setup()
    with pytest.raises(ValueError, match=r"0\.001 of 100 training images leaves one of the sets empty"):
        Small(val_fraction=0.001).setup()


def test_digits():
    data = Digits()
    x_train, y_train, x_test, y_test = data.load()
    assert x_train.shape == (1437, 8, 8)
    assert x_test.shape == (360, 8, 8)
    assert (x_train.min(), x_train.max(), x_train.dtype) == (0, 255, torch.uint8)
    assert np.abs(np.bincount(y_test) - 36).max() <= 1  # stratified
    assert len(y_train) == 1437
    assert torch.equal(Digits(seed=3).load()[2], x_test)
    data.setup()
    assert (data.input_shape, data.num_classes) == ((1, 32, 32), 10)


def test_the_fingerprint_is_of_what_was_loaded():
    class Other(Small):
        def load(self):
            x_train, y_train, x_test, y_test = super().load()
            y_test[3] += 1
            return x_train, y_train, x_test, y_test

    made = [Small(), Small(size=8, val_fraction=0.2, seed=3), Other()]
    for data in made:
        data.setup()
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
