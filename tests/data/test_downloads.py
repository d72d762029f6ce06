"""MNIST and CIFAR: what is there is read, what is absent is fetched, and a failure says what to set."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision import datasets

from lowrank_pl.data import CIFAR10, CIFAR100, MNIST, FashionMNIST

SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA")
CLASSES = [MNIST, FashionMNIST, CIFAR10, CIFAR100]


class Mirror:
    """Stands for a torchvision dataset. Keeps the calls that it gets."""

    def __init__(self, monkeypatch, name, shape, present=False, error=None):
        self.__name__, self.shape, self.present, self.error, self.calls = name, shape, present, error, []
        monkeypatch.setattr(datasets, name, self)

    def __call__(self, root, train, download):
        self.calls.append((root, train, download))
        if download and self.error:
            raise self.error
        self.present |= download
        if not self.present:
            raise RuntimeError("Dataset not found or corrupted.")
        count = 20 if train else 8
        images = np.random.default_rng(0).integers(0, 256, (count, *self.shape), dtype=np.uint8)
        return SimpleNamespace(data=images, targets=[i % 4 for i in range(count)])


@pytest.mark.parametrize("data", CLASSES)
def test_reads_what_is_there(monkeypatch, data):
    mirror = Mirror(monkeypatch, data.__name__, (6, 6, 3), present=True)
    module = data(root="here", mean=[0.5] * 3, std=[0.5] * 3) if "CIFAR" in data.__name__ else data("here")
    module.setup()
    assert mirror.calls == [("here", True, False), ("here", False, False)]
    assert module.num_classes == 4


@pytest.mark.parametrize("data", CLASSES)
def test_fetches_what_is_absent(monkeypatch, data):
    mirror = Mirror(monkeypatch, data.__name__, (6, 6, 3))
    data(root="here").prepare_data()
    assert mirror.calls == [("here", True, False), ("here", True, True), ("here", False, False)]


@pytest.mark.parametrize("data", CLASSES)
def test_no_network(monkeypatch, data):
    Mirror(monkeypatch, data.__name__, (6, 6, 3), error=OSError("no route"))
    with pytest.raises(RuntimeError, match=rf"{data.__name__} is not in 'here'.*no route.*set `data.root`"):
        data(root="here").setup()


def test_defaults_of_the_papers(monkeypatch):
    Mirror(monkeypatch, "MNIST", (6, 6), present=True)
    Mirror(monkeypatch, "CIFAR10", (6, 6, 3), present=True)
    mnist, cifar = MNIST(), CIFAR10()
    (x, _), (raw, _) = next(iter(mnist.train_dataloader())), (mnist.load()[0].float() / 255, None)
    np.testing.assert_allclose(x.mean(0)[0], np.zeros((6, 6)), atol=1e-5)
    np.testing.assert_allclose(x.std(0)[0], raw.std(0), atol=1e-5)
    (test, _) = next(iter(cifar.test_dataloader()))
    expected = (cifar.load()[2][0, 0, 0].numpy() / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(test[0, :, 0, 0], expected, atol=1e-5)
    assert cifar.augment
    assert not mnist.augment


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with MNIST")
def test_real_mnist():
    data = MNIST(root=SHARED_DATA)
    data.setup()
    assert (data.input_shape, data.num_classes) == ((1, 28, 28), 10)
    assert sum(len(y) for _, y in data.train_dataloader()) == 60_000
    assert sum(len(y) for _, y in data.test_dataloader()) == 10_000
