"""Exported files against the networks they were made of."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_pl import BlockSVD, FixedRank, Targets, TensorTrain, TiledSVD, compress
from lowrank_pl.exporting import SUFFIXES, disagreement, export, load_exported
from lowrank_pl.layers import ConstantLayer, spec_of
from lowrank_pl.models import CifarResNet, LeNet5

EVERYTHING = Targets(skip_first=False, skip_last=False)
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
METHODS = {
    "svd": "svd", "spatial_svd": "spatial_svd", "tucker2": "tucker2", "separable_svd": "separable_svd", "cp": "cp",
    "block_svd": BlockSVD(4),
    "tiled_factors": TiledSVD(16, run="factors"), "tiled_dense": TiledSVD(16, run="dense"),
    "train_factors": TensorTrain(run="factors"), "train_dense": TensorTrain(run="dense"),
}  # fmt: skip


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    net = CifarResNet(depth=8, input_shape=(3, 16, 16)).eval()
    return compress(net, METHODS[method], FixedRank(3), EVERYTHING, example_input=IMAGES).eval()


def has_onnx() -> bool:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return True


def has_packages(suffix: str) -> bool:
    if suffix == ".xml":
        pytest.importorskip("openvino")
    return suffix != ".onnx" or has_onnx()


@pytest.mark.parametrize("method", METHODS)
def test_pt2_runs_without_lowrank_pl_on_any_batch(method: str, tmp_path: Path) -> None:
    net = network(method)
    assert export(net, IMAGES, tmp_path / "model.pt2") < 1e-5
    batches = [IMAGES[:1], IMAGES[:3], torch.cat([IMAGES] * 3)]
    np.savez(tmp_path / "images.npz", *[batch.numpy() for batch in batches])
    code = (
        "import sys; sys.modules['lowrank_pl'] = None; import numpy, torch\n"  # importing it raises
        "run = torch.export.load('model.pt2').module(); images = numpy.load('images.npz')\n"
        "out = [run(torch.from_numpy(images[k])).detach().numpy() for k in images]\n"
        "numpy.savez('out.npz', *out)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with np.load(tmp_path / "out.npz") as out, torch.no_grad():
        for key, batch in zip(out, batches, strict=True):
            assert disagreement(torch.from_numpy(out[key]), net(batch)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_onnx_runs_on_any_batch(method: str, tmp_path: Path) -> None:
    assert has_onnx()
    import onnxruntime

    net = network(method)
    assert export(net, IMAGES, tmp_path / "model.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (IMAGES[:1], IMAGES[:3], torch.cat([IMAGES] * 3)):
        (out,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            assert disagreement(torch.from_numpy(out), net(batch)) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # weights are in it


@pytest.mark.parametrize("method", METHODS)
def test_openvino_runs_on_any_batch(method: str, tmp_path: Path) -> None:
    """As OpenVINO itself reads the files, in float32."""
    openvino = pytest.importorskip("openvino")
    net = network(method)
    assert export(net, IMAGES, tmp_path / "model.xml") < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    model = openvino.compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (IMAGES[:1], IMAGES[:3], torch.cat([IMAGES] * 3)):
        with torch.no_grad():
            assert disagreement(torch.from_numpy(model(batch.numpy())[0]), net(batch)) < 1e-5
    stored = sum(p.numel() for p in net.parameters())
    if method != "tiled_dense":  # weights are stored as they are, and once
        assert (tmp_path / "model.bin").stat().st_size < 4.5 * stored + 20_000


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_constants_and_channels_last(suffix: str, tmp_path: Path) -> None:
    assert has_packages(suffix)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), ConstantLayer(spec_of(nn.Conv2d(4, 6, 3)), bias=True), nn.Flatten(), nn.LazyLinear(2)
    )
    net(IMAGES)
    net = net.to(memory_format=torch.channels_last).eval()
    assert export(net, IMAGES, tmp_path / f"model{suffix}") < 1e-5
    with torch.no_grad():
        assert disagreement(load_exported(tmp_path / f"model{suffix}")(IMAGES[:2]), net(IMAGES[:2])) < 1e-5


class Stubborn(nn.Module):
    """Does something else once it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * (3 if torch.compiler.is_compiling() else 1)


def test_a_wrong_export_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(ValueError, match="differs by 2"):
        export(Stubborn(), IMAGES, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_arguments(tmp_path: Path) -> None:
    net = LeNet5(input_shape=(3, 16, 16))
    with pytest.raises(ValueError, match="ending in"):
        export(net, IMAGES, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="at least 2 images"):
        export(net, IMAGES[:1], tmp_path / "model.pt2")


@pytest.mark.parametrize("suffix", SUFFIXES.values())
def test_a_damaged_file_is_named(suffix: str, tmp_path: Path) -> None:
    assert has_packages(suffix)
    file = tmp_path / f"model{suffix}"
    export(LeNet5(input_shape=(3, 16, 16)).eval(), IMAGES, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"model{suffix} cannot be read"):
        load_exported(file)


def test_differences_with_nan_are_none() -> None:
    good, bad = torch.ones(2, 3), torch.ones(2, 3)
    for value in (float("nan"), float("inf")):
        bad[1, 2] = value
        assert disagreement(bad, good) == disagreement(good, bad) == disagreement(bad, bad) == float("inf")


class Deceptive(nn.Module):
    """Gives NaN for a single image, once it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = torch.clamp(torch.ones_like(x).flatten(1).cumsum(0)[-1:] - 1, max=1)
        return x.flatten(1) * (rest / rest if torch.compiler.is_compiling() else 1)


def test_an_export_that_gives_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differs by inf"):
        export(Deceptive(), IMAGES, tmp_path / "model.pt2")
    net = LeNet5(input_shape=(3, 16, 16)).eval()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    for suffix in (".pt2", ".onnx"):
        with pytest.raises(ValueError, match="gives NaN or infinity on these images"):
            export(net, IMAGES, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_export_is_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Two(), (IMAGES,)), tmp_path / "two.pt2")
    with pytest.raises(ValueError, match=r"two.pt2: expected one tensor of outputs but got"):
        load_exported(tmp_path / "two.pt2")(IMAGES)
    with pytest.raises(ValueError, match=r"two.pt2 does not run on \[5, 3, 16\] images"):
        load_exported(tmp_path / "two.pt2")(IMAGES[..., 0])
    with pytest.raises(ValueError, match=r"two.pt2: expected at most"):
        load_exported(tmp_path / "two.pt2", most=100)
    (tmp_path / "link.pt2").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="expected a regular file"):
        load_exported(tmp_path / "link.pt2")


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x + 1
