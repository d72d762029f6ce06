"""Images from an .npz file."""

import os
from pathlib import Path

import numpy as np
import pytest

from lowrank_pl.data import Arrays

SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA")


@pytest.fixture
def arrays():
    x, y = np.arange(6 * 4 * 4 * 3).reshape(6, 4, 4, 3) % 256, np.arange(6, dtype=np.int32)
    return {"x_train": x.astype(np.uint8), "y_train": y, "x_test": x[:2].astype(np.uint8), "y_test": y[:2]}


def written(path, arrays):
    np.savez(path / "images.npz", **arrays)
    return str(path / "images.npz")


def test_reads(tmp_path, arrays):
    data = Arrays(file=written(tmp_path, arrays), mean=[0] * 3, std=[1] * 3)
    ((x, y),) = data.test_dataloader()
    assert (data.input_shape, data.num_classes) == ((3, 4, 4), 6)
    np.testing.assert_allclose(x.numpy(), arrays["x_test"].transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert y.tolist() == [0, 1]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.npz'?: set `data.file` to an .npz with x_train"):
        Arrays(file=str(tmp_path / "absent.npz")).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, r"y_test not among x_test, x_train, y_train"),
        ({"x_train": np.zeros((6, 4, 4, 3))}, r"x_train as uint8 .* got float64 \[6, 4, 4, 3\]"),
        ({"x_test": np.zeros((2, 9), np.uint8)}, r"x_test as uint8 \[N, H, W, C\] .* got uint8 \[2, 9\]"),
        ({"y_train": np.zeros(6)}, r"y_train as integers \[N\], got float64 \[6\]"),
        ({"y_train": np.zeros((6, 1), int)}, r"y_train as integers \[N\], got int64 \[6, 1\]"),
        ({"y_train": np.zeros(5, int)}, "as many labels as images, got 6 in x_train and 5 in y_train"),
        ({"y_test": np.array([0, -1])}, "labels from 0 in y_test, got -1"),
        ({"x_test": np.zeros((2, 5, 4, 3), np.uint8)}, "images of one size in both sets"),
        ({"x_test": np.array([None, {}])}, "an .npz of plain arrays"),
    ],
)
def test_bad_contents(tmp_path, arrays, change, message):
    contents = {key: value for key, value in (arrays | change).items() if value is not None}
    file = written(tmp_path, contents)
    with pytest.raises(ValueError, match=message) as error:
        Arrays(file=file).setup()
    assert file in str(error.value)
    assert "data.file" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"neither a zip nor an array", b"PK\x03\x04 broken"])
def test_not_an_npz(tmp_path, content):
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"`data.file`.*: expected an .npz of plain arrays"):
        Arrays(file=str(tmp_path / "images.npz")).setup()


def test_one_array_is_not_an_npz(tmp_path, arrays):
    np.save(tmp_path / "images.npy", arrays["x_train"])
    with pytest.raises(ValueError, match=r"`data.file`"):
        Arrays(file=str(tmp_path / "images.npy")).setup()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with cifar10.npz")
def test_cifar10():
    data = Arrays(file=str(Path(SHARED_DATA, "cifar10.npz")), augment=True)
    data.setup()
    assert (data.input_shape, data.num_classes) == ((3, 32, 32), 10)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, y.shape) == ((128, 3, 32, 32), (128,))
