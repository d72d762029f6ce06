"""The plain module at the end of a fit."""

import copy
import itertools
import json

import pytest
import pytorch_lightning as pl
import torch
from nets import Module, Net, OwnLayers, distance, images, loader, quiet_trainer, ranks, weights
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn

from lowrank_pl import DeepTwist, ExtractStructure, FixedRank, TiledSVD, load_compressed
from lowrank_pl.layers import SplitAttention
from lowrank_pl.surgery import num_parameters

RANK = FixedRank(2)
X = images(2, seed=9)[0]


def agree(extracted, net, x=X):
    with torch.no_grad():
        a, b = copy.deepcopy(extracted).eval()(x), copy.deepcopy(net).eval()(x)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_any_order_of_callbacks(tmp_path, order):
    extract = ExtractStructure()
    callbacks = [DeepTwist(4, "svd", RANK), extract, ModelCheckpoint(tmp_path, save_last=True)]
    module = Module(Net(norm=True))
    loop = quiet_trainer(
        tmp_path, *[callbacks[i] for i in order], max_steps=6, val_check_interval=2, enable_checkpointing=True
    )
    loop.fit(module, loader(), loader(1))
    assert set(ranks(module.net).values()) == {2}
    assert isinstance(extract.extracted.net.conv2, nn.Sequential)
    assert agree(extract.extracted, module)
    assert extract.report.compressed.params == num_parameters(extract.extracted.net)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"net.{name}" for name in weights(module.net)}


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2", "block_svd", TiledSVD(tile=8)])
def test_output_is_the_projected_networks(tmp_path, method):
    extract, module = ExtractStructure(tmp_path / "c", submodule="net"), Module(Net(norm=True, dropout=0.5))
    quiet_trainer(tmp_path, DeepTwist(4, method, RANK), extract, max_steps=5).fit(module, loader())
    assert agree(extract.extracted, module.net)
    assert num_parameters(extract.extracted) < num_parameters(module.net)
    assert agree(load_compressed(Net(norm=True), tmp_path / "c"), module.net)


@pytest.mark.parametrize("others", [[], [DeepTwist(2), DeepTwist(3)]])
def test_without_exactly_one_method(tmp_path, others):
    loop = quiet_trainer(tmp_path, ExtractStructure(), max_steps=1)
    loop.callbacks += others  # the Trainer itself refuses two of a kind
    with pytest.raises(ValueError, match=rf"DeepTwist\(\).*{len(others)}"):
        loop.fit(Module(), loader())


@pytest.mark.parametrize("friend", [False, True])
def test_the_trainer_is_not_copied(tmp_path, friend):
    class Loud(pl.Callback):
        def __deepcopy__(self, memo):
            raise AssertionError("a callback was copied")

    class Holder(Module):
        def on_fit_start(self):
            self.friend = self.trainer if friend else None  # users do this

    extract, module = ExtractStructure(), Holder()
    callback = DeepTwist(4, "svd", RANK, monitor_loss=True)
    quiet_trainer(tmp_path, callback, extract, Loud(), max_steps=4).fit(module, loader())
    assert extract.extracted._trainer is None
    assert module._trainer is not None
    copy.deepcopy(extract.extracted)


def test_submodule(tmp_path):
    extract, module = ExtractStructure(tmp_path / "net", submodule="net"), Module()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), extract, max_steps=4).fit(module, loader())
    assert type(extract.extracted) is Net
    written = json.loads((tmp_path / "net" / "structure.json").read_text())
    assert sorted(written["layers"]) == ["conv2", "fc1"]
    assert sorted(written["notes"]) == ["conv1", "conv2", "fc1", "fc2"]
    layer = ExtractStructure(submodule="net.conv2")
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), layer, max_steps=4).fit(module, loader())
    assert isinstance(layer.extracted, nn.Sequential)


def test_submodule_that_does_not_exist(tmp_path):
    module = Module()
    before = weights(module.net)
    loop = quiet_trainer(tmp_path, DeepTwist(2), ExtractStructure(submodule="model"), max_steps=2)
    with pytest.raises(ValueError, match=r"'model'.*net"):
        loop.fit(module, loader())
    assert distance(before, weights(module.net)) == 0


def test_modules_with_their_own_layers(tmp_path):
    extract, module = ExtractStructure(tmp_path / "own"), OwnLayers()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), extract, max_steps=4).fit(module, loader())
    assert isinstance(extract.extracted.conv2, nn.Sequential)
    with torch.no_grad():
        assert torch.allclose(extract.extracted.logits(X), module.logits(X), atol=1e-5)
        again = load_compressed(OwnLayers(), tmp_path / "own")
        assert torch.equal(again.logits(X), extract.extracted.logits(X))


def test_the_report_is_about_what_was_extracted(tmp_path):
    """Also where `training_step` calls layers one by one, and no module has all of them."""
    extract, module = ExtractStructure(), OwnLayers()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), extract, max_steps=4).fit(module, loader())
    assert extract.report.dense.params == num_parameters(module)
    assert extract.report.compressed.params == num_parameters(extract.extracted)


def test_the_report_of_a_submodule_that_is_not_called_itself(tmp_path):
    class Pair(Module):
        def __init__(self):
            super().__init__()
            self.net_head = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4))

        def forward(self, x):
            net = self.net
            x = torch.tanh(net.conv2(torch.tanh(net.conv1(x))))
            return self.net_head(net.fc2(torch.tanh(net.fc1(nn.functional.avg_pool2d(x, 2).flatten(1)))))

    extract, module = ExtractStructure(submodule="net"), Pair()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), extract, max_steps=4).fit(module, loader())
    assert extract.report.dense.params == num_parameters(module.net)
    assert extract.report.compressed.params == num_parameters(extract.extracted)


def test_the_report_measures_on_inputs_that_were_seen(tmp_path):
    extract, module = ExtractStructure(), Module()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), extract, max_steps=4).fit(module, loader())
    macs = {layer.name: (layer.dense.macs, layer.compressed.macs) for layer in extract.report.layers}
    assert macs["net.conv2"] == (864 * 16, (2 * 72 + 2 * 12) * 16)
    assert macs["net.fc1"] == (768, 2 * 64)


@pytest.mark.parametrize("tampered", ["layer", "factor"])
def test_what_was_changed_behind_our_back(tmp_path, tampered):
    """The weights, or a factor, changed between the last projection and extraction."""

    class Tamper(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            callback = trainer.callbacks[0]
            with torch.no_grad():
                if tampered == "factor":
                    callback.distortion.structures["net.conv2"].tensors[1].mul_(1.01)
                else:
                    pl_module.net.conv2.weight.data.mul_(1.01)

    extract = ExtractStructure()
    loop = quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK), Tamper(), extract, max_steps=4)
    if tampered == "factor":
        with pytest.raises(RuntimeError, match=r"net\.conv2"):
            loop.fit(Module(), loader())
    else:
        module = Module()
        loop.fit(module, loader())  # refused, or projected again
        assert agree(extract.extracted, module)


def test_interrupted(tmp_path):
    class Interrupted(Module):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    for order in (1, -1):
        extract, module = ExtractStructure(tmp_path / str(order)), Interrupted()
        with pytest.raises(SystemExit):
            quiet_trainer(tmp_path, *[DeepTwist(2, "svd", RANK), extract][::order]).fit(module, loader())
        assert agree(extract.extracted, module)
        assert (tmp_path / str(order) / "model.safetensors").is_file()


def test_a_real_error_extracts_nothing(tmp_path):
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    extract = ExtractStructure(tmp_path / "c")
    with pytest.raises(RuntimeError, match="broken"):
        quiet_trainer(tmp_path, DeepTwist(2, "svd", RANK), extract).fit(Broken(), loader())
    assert extract.extracted is None
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("S_D", [2, 4, 5])
def test_weight_averaging(tmp_path, order, S_D):
    """Lightning's average ends up in the module; what is extracted is the average, projected (facts, 10)."""
    averages = []

    class Watch(WeightAveraging):
        def on_train_end(self, trainer, pl_module):
            averages.append({n: p.detach().clone() for n, p in self._average_model.module.named_parameters()})
            super().on_train_end(trainer, pl_module)

    extract, module = ExtractStructure(submodule="net"), Module()
    callbacks = [DeepTwist(S_D, "svd", RANK), Watch()][::order]
    quiet_trainer(tmp_path, *callbacks, extract, max_steps=4).fit(module, loader())
    expected = Net()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(averages[0][f"net.{name}"])
        for name in ("conv2", "fc1"):
            weight = expected.get_submodule(name).weight
            u, s, v = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
            weight.copy_(((u[:, :2] * s[:2]) @ v[:2]).reshape(weight.shape))
    assert agree(module.net, expected)
    assert agree(extract.extracted, expected)


def test_a_fit_with_nothing_to_train(tmp_path):
    extract, module = ExtractStructure(), Module()
    quiet_trainer(tmp_path, DeepTwist(2, "svd", RANK), extract, max_epochs=0).fit(module, loader())
    assert agree(extract.extracted, module)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = quiet_trainer(tmp_path, DeepTwist(2, "svd", RANK), ExtractStructure(tmp_path / "file" / "c"), max_steps=2)
    with pytest.raises(OSError, match="`dirpath`"):
        trainer.fit(Module(), loader())
    assert trainer.global_step == 0  # known before anything is trained
    assert (tmp_path / "file").read_text() == "in the way"


def test_layers_that_attention_reads(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.last = nn.Linear(16, 4)

        def forward(self, x):
            x = self.inner(x.flatten(1)[:, :64].reshape(-1, 4, 16))
            return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))

    extract, module = ExtractStructure(), Module(Attention())
    quiet_trainer(tmp_path, DeepTwist(2, "svd", RANK), extract, max_steps=3).fit(module, loader())
    assert isinstance(extract.extracted.net.inner, nn.Sequential)
    assert isinstance(extract.extracted.net.attention, SplitAttention)
    assert isinstance(extract.extracted.net.attention.out_proj, nn.Sequential)
    assert agree(extract.extracted, module)
