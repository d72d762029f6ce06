"""Compressed networks on disk."""

import builtins
import copy
import json
import os
import pickle

import pytest
import torch
from nets import Net, distance, images, weights
from torch import nn

from lowrank_pl import (
    CP,
    SVD,
    BlockSVD,
    FixedRank,
    SeparableSVD,
    SpatialSVD,
    Targets,
    TensorTrain,
    TiledSVD,
    Tucker2,
    compress,
    load_compressed,
    save_compressed,
    summarize,
)
from lowrank_pl.storage import checksum

X = images(2)[0]
RANK = FixedRank(2)
METHODS = [
    SVD(),
    BlockSVD(4),
    SpatialSVD(),
    Tucker2(),
    SeparableSVD(),
    CP(),
    TiledSVD(8, run="dense"),
    TiledSVD(8, run="factors"),
    TensorTrain(run="dense"),
    TensorTrain(run="factors"),
]


def small(method="svd", **arguments):
    return compress(Net(norm=True, **arguments), method, RANK, example_input=X).eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    save_compressed(small(), tmp_path)
    return tmp_path


def edit(folder, change, signed=True):
    """Change the structure; with `signed`, so that the checksum fits and only the later checks can see it."""
    path = folder / "structure.json"
    structure = json.loads(path.read_text())
    change(structure)
    if signed and "sha256" in structure:
        structure["sha256"] = checksum((folder / "model.safetensors").read_bytes(), structure)
    path.write_text(json.dumps(structure))


# -- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(tmp_path, method):
    network, fresh = small(method), Net(norm=True).eval()
    before = weights(fresh)
    save_compressed(network, tmp_path)
    again = load_compressed(fresh, tmp_path)
    assert set(contents(tmp_path)) == {"model.safetensors", "structure.json"}
    assert distance(weights(network), weights(again)) == 0
    with torch.no_grad():
        assert torch.equal(network(X), again(X))
    assert again.lowrank_pl_record == network.lowrank_pl_record
    assert distance(before, weights(fresh)) == 0
    assert isinstance(fresh.conv2, nn.Conv2d)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    before = contents(tmp_path)
    save_compressed(again, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_the_network_alone(tmp_path, method):
    torch.manual_seed(3)
    network = small(method)
    for name in ("a", "b"):
        save_compressed(network, tmp_path / name)
        torch.rand(7)
        network = copy.deepcopy(network)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_the_fresh_instances(saved, training):
    again = load_compressed(Net(norm=True).train(training), saved)
    assert all(m.training == training for m in again.modules())


def test_loaded_networks_train(saved):
    again = load_compressed(Net(norm=True), saved)
    again(X).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in again.parameters())


def test_other_kinds_of_layers(tmp_path):
    def network():
        return nn.Sequential(
            nn.Conv1d(4, 8, 3, stride=2, padding=1, padding_mode="circular"),
            nn.ConvTranspose1d(8, 8, 3, output_padding=1, stride=2, groups=2),
            nn.Conv1d(8, 8, 3, padding="same", dilation=2, bias=False),
        ).eval()

    x, targets = torch.randn(2, 4, 16), Targets(skip_first=False, skip_last=False)
    made = compress(network(), "svd", FixedRank(1), targets, example_input=x)
    assert all(isinstance(layer, nn.Sequential) for layer in made)
    save_compressed(made, tmp_path)
    assert torch.equal(load_compressed(network(), tmp_path)(x), made(x))


def test_a_network_that_is_one_layer(tmp_path):
    targets = Targets(skip_last=False)
    made = compress(nn.Linear(16, 16), "svd", RANK, targets)
    save_compressed(made, tmp_path)
    assert distance(weights(load_compressed(nn.Linear(16, 16), tmp_path)), weights(made)) == 0


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(10, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.inner(self.embedding(x)))

    x = torch.arange(10)
    made = compress(Tied(), "svd", RANK, Targets(skip_last=False), example_input=x)
    save_compressed(made, tmp_path)
    again = load_compressed(Tied(), tmp_path)
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again(x), made(x))


def test_shared_modules_stay_shared(tmp_path):
    def network():
        layer = nn.Linear(16, 16)
        return nn.Sequential(layer, nn.Tanh(), layer)

    made = compress(network(), "svd", RANK, Targets(skip_last=False))
    save_compressed(made, tmp_path)
    again = load_compressed(network(), tmp_path)
    assert again[0] is again[2]
    assert torch.equal(again(torch.ones(1, 16)), made(torch.ones(1, 16)))


def test_unchanged_copies_are_saved_too(tmp_path):
    with pytest.warns(UserWarning, match="stay dense"):
        made = compress(Net(), "svd", FixedRank(1000))
    save_compressed(made, tmp_path)
    assert distance(weights(load_compressed(Net(), tmp_path)), weights(made)) == 0


def test_channels_last(tmp_path):
    made = compress(Net().to(memory_format=torch.channels_last), "svd", RANK)
    save_compressed(made, tmp_path)
    assert distance(weights(load_compressed(Net(), tmp_path)), weights(made)) == 0


def test_one_type_of_numbers_throughout(tmp_path):
    """A float64 file in a float32 instance: refused, or a network that runs."""
    made = compress(Net().double(), "svd", RANK)
    save_compressed(made, tmp_path)
    assert distance(weights(load_compressed(Net().double(), tmp_path)), weights(made)) == 0
    try:
        again = load_compressed(Net(), tmp_path)
    except ValueError:
        return
    assert len({p.dtype for p in again.parameters()}) == 1
    assert torch.isfinite(again(X)).all()


def test_loaded_networks_are_reported_alike(saved):
    one = summarize(Net(norm=True), small(), X, latency=False)
    two = summarize(Net(norm=True), load_compressed(Net(norm=True), saved), X, latency=False)
    assert one == two


# -- what is refused -----------------------------------------------------------------------------------------------


def test_networks_without_a_record(tmp_path):
    with pytest.raises(ValueError, match=r"compress\(\)"):
        save_compressed(Net(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "structure.json"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_compressed(Net(norm=True), saved)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_compressed"):
        load_compressed(Net(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "structure.json"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(saved, name, share):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="truncated or altered"):
        load_compressed(Net(norm=True), saved)


@pytest.mark.parametrize("position", [0, 8, 100, -1])
def test_altered_weights(saved, position):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[position] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="truncated or altered"):
        load_compressed(Net(norm=True), saved)


def conv2(structure):
    return structure["layers"]["conv2"]


def stage(structure):
    return conv2(structure)["structure"]["stages"][0]


SQUARE = {"in_channels": 12, "out_channels": 12}
ALTERATIONS = {
    "no format": lambda s: s.pop("format"),
    "later format": lambda s: s.update(format=2),
    "no checksum": lambda s: s.pop("sha256"),
    "layers as a list": lambda s: s.update(layers=[]),
    "notes as a list": lambda s: s.update(notes=[]),
    "entry as a list": lambda s: s["layers"].update(conv2=[]),
    "no structure": lambda s: conv2(s).pop("structure"),
    "structure as a list": lambda s: conv2(s).update(structure=[1]),
    "structure as a string": lambda s: conv2(s).update(structure="chain"),
    "unknown kind": lambda s: conv2(s)["structure"].update(kind="pickle"),
    "stages as a dict": lambda s: conv2(s)["structure"].update(stages={}),
    "no stages": lambda s: conv2(s)["structure"].update(stages=[]),
    "one stage": lambda s: conv2(s)["structure"]["stages"].pop(),
    "stage as a number": lambda s: conv2(s)["structure"]["stages"].insert(0, 3),
    "channels as text": lambda s: stage(s).update(out_channels="2"),
    "channels as a float": lambda s: stage(s).update(out_channels=2.0),
    "negative channels": lambda s: stage(s).update(out_channels=-2),
    "huge channels": lambda s: stage(s).update(out_channels=10**12),
    "astronomic channels": lambda s: stage(s).update(out_channels=10**30),
    "huge kernel": lambda s: stage(s).update(kernel=[10**9, 10**9]),
    "kernel of four axes": lambda s: stage(s).update(kernel=[3, 3, 3, 3]),
    "kernel as a number": lambda s: stage(s).update(kernel=3),
    "kernel as text": lambda s: stage(s).update(kernel="33"),
    "kernel of lists": lambda s: stage(s).update(kernel=[[3], [3]]),
    "padding as a number": lambda s: stage(s).update(padding=1),
    "padding as text": lambda s: stage(s).update(padding="wide"),
    "unknown padding mode": lambda s: stage(s).update(padding_mode="magic"),
    "padding mode as a list": lambda s: stage(s).update(padding_mode=[]),
    "groups that do not divide": lambda s: stage(s).update(groups=3),
    "no groups": lambda s: stage(s).update(groups=0),
    "huge padding": lambda s: stage(s).update(padding=[10**6, 0]),
    "padding of one more": lambda s: stage(s).update(padding=[2, 0]),
    "huge dilation": lambda s: stage(s).update(dilation=[10**6, 1]),
    "many stages": lambda s: conv2(s)["structure"]["stages"].extend([conv2(s)["structure"]["stages"][1] | SQUARE] * 40),
    "extra key": lambda s: stage(s).update(extra=1),
    "kind as a list": lambda s: stage(s).update(kind=["conv"]),
    "another stride": lambda s: stage(s).update(stride=[1, 1]),
    "another dilation": lambda s: stage(s).update(dilation=[2, 2]),
    "another padding": lambda s: stage(s).update(padding=[0, 0]),
    "one layer less": lambda s: s["layers"].pop("conv2"),
    "a layer that is none": lambda s: s["layers"].update({"drop": conv2(s)}),
    "name outside": lambda s: s["layers"].update({"../conv2": conv2(s)}),
    "absolute name": lambda s: s["layers"].update({"/tmp/conv2": conv2(s)}),
    "empty name": lambda s: s["layers"].update({"": conv2(s)}),
    "another dense layer": lambda s: conv2(s)["replaces"].update(out_channels=13),
    "replaces as text": lambda s: conv2(s).update(replaces="conv2"),
}


UNSEEN = ("another stride", "another dilation", "another padding")  # but for the checksum


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", list(ALTERATIONS))
def test_altered_structure(saved, name, signed):
    if signed and name in UNSEEN:
        pytest.skip("as good as a network that somebody saved")
    edit(saved, ALTERATIONS[name], signed)
    fresh, before = Net(norm=True), contents(saved)
    with pytest.raises(ValueError):
        load_compressed(fresh, saved)
    assert distance(weights(fresh), weights(Net(norm=True))) == 0
    assert contents(saved) == before


TILES = {
    "tile as text": {"tile": "8"},
    "huge tile": {"tile": 10**30},
    "rank above the tile": {"rank": 9},
    "rank 0": {"rank": 0},
    "unknown run": {"run": "eval"},
    "run as a list": {"run": ["dense"]},
    "layer as text": {"layer": "conv"},
    "no layer": {"layer": None},
}


@pytest.mark.parametrize("name", list(TILES))
def test_altered_tiles(tmp_path, name):
    save_compressed(small(TiledSVD(8)), tmp_path)
    edit(tmp_path, lambda s: conv2(s)["structure"].update(TILES[name]))
    with pytest.raises(ValueError):
        load_compressed(Net(norm=True), tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{", "\x00", "[" * 100_000, "9" * 10_000, "{}"])
def test_files_that_are_no_structure(saved, text):
    (saved / "structure.json").write_text(text)
    with pytest.raises(ValueError):
        load_compressed(Net(norm=True), saved)


def test_bytes_that_are_no_text(saved):
    (saved / "structure.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="truncated or altered"):
        load_compressed(Net(norm=True), saved)


@pytest.mark.parametrize("other", [Net(), nn.Sequential(nn.Linear(4, 4)), nn.Identity()])
def test_for_another_network(saved, other):
    with pytest.raises(ValueError, match="another network"):
        load_compressed(other, saved)


def test_of_another_size(saved):
    other = Net(norm=True)
    other.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"another network.*conv2"):
        load_compressed(other, saved)
    other = Net(norm=True)
    other.fc2 = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"another network.*fc2"):
        load_compressed(other, saved)
    other = Net(norm=True)
    other.conv2.stride = (1, 1)
    with pytest.raises(ValueError, match=r"another network.*conv2"):
        load_compressed(other, saved)


def test_sizes_are_checked_before_memory_is_taken(saved, monkeypatch):
    """A structure of 10^11 weights, whose file is consistent with itself in every name."""
    edit(saved, lambda s: stage(s).update(out_channels=10**9))
    edit(saved, lambda s: conv2(s)["structure"]["stages"][1].update(in_channels=10**9))
    with pytest.raises(ValueError, match="another network"):
        load_compressed(Net(norm=True), saved)


def test_no_pickle_is_read(saved, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_compressed(Net(norm=True), saved)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="truncated or altered"):
        load_compressed(Net(norm=True), saved)


# -- writing that fails --------------------------------------------------------------------------------------------


def other():
    return small(BlockSVD(4))


@pytest.mark.parametrize("call", [0, 1])
def test_a_move_that_fails_leaves_the_old_network(saved, monkeypatch, call):
    before, replace, calls = contents(saved), os.replace, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise OSError("no space left on device")
        replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_compressed(other(), saved)
    monkeypatch.undo()
    assert contents(saved) == before
    load_compressed(Net(norm=True), saved)


@pytest.mark.parametrize("call", [0, 1])
def test_a_full_disk_leaves_the_old_network(saved, monkeypatch, call):
    before, calls = contents(saved), []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_compressed(other(), saved)
    assert contents(saved) == before


def test_a_file_that_cannot_be_opened(saved, monkeypatch):
    before, original = contents(saved), builtins.open

    def fail(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise PermissionError(f"{path}")
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", fail)
    with pytest.raises(PermissionError):
        save_compressed(other(), saved)
    monkeypatch.undo()
    assert contents(saved) == before


def test_overwriting(saved):
    save_compressed(other(), saved)
    assert set(contents(saved)) == {"model.safetensors", "structure.json"}
    assert distance(weights(load_compressed(Net(norm=True), saved)), weights(other())) == 0
