"""What a fit has made is there when it ends, whatever else goes wrong."""

import copy
import threading

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Module, Net, images, loader, quiet_trainer, ranks, weights
from pytorch_lightning.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lowrank_pl import DeepTwist, ExtractStructure, FixedRank, Targets, load_compressed, save_compressed
from lowrank_pl.extraction import difference
from lowrank_pl.layers import FactorChain

RANK = FixedRank(2)
X = images(2, seed=9)[0]


def fit(root, module, *callbacks, **arguments):
    deeptwist = DeepTwist(2, "svd", RANK, **arguments)
    quiet_trainer(root, deeptwist, *callbacks, max_steps=4).fit(module, loader())


class Holder(Module):
    """Keeps something that cannot be copied beside its network, from the start or when training has begun."""

    def __init__(self, thing, at_once=True):
        super().__init__()
        self.things = [thing]
        self.kept = self.things if at_once else None

    def on_train_start(self):
        self.kept = self.things


class Quiet(Holder):
    def __init__(self, thing):
        super().__init__(thing)
        del self.things  # `kept` alone


@pytest.mark.parametrize("make", [threading.Lock, lambda: (i for i in range(3)), lambda: iter(loader())])
def test_what_cannot_be_copied_is_named_at_the_start(tmp_path, make):
    module = Quiet(make())
    before = weights(module.net)
    with pytest.raises(ValueError, match=r"Quiet.*'kept'.*submodule"):
        fit(tmp_path, module, ExtractStructure())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(module.net).values(), strict=True))


def test_only_the_part_to_be_extracted_is_copied(tmp_path):
    extract, module = ExtractStructure(submodule="net"), Holder(threading.Lock())
    fit(tmp_path, module, extract)
    assert isinstance(extract.extracted.conv2, nn.Sequential)


@pytest.mark.parametrize("name", ["monitor_loss", "recalibrate_bn"])
def test_a_copy_for_extra_passes_is_tried_at_the_start_too(tmp_path, name):
    module = Holder(threading.Lock())
    with pytest.raises(ValueError, match=rf"`{name}`.*'(things|kept)'"):
        fit(tmp_path, module, **{name: 1})


def test_what_cannot_be_copied_since_is_left_out(tmp_path):
    class Later(Module):
        def on_train_start(self):
            self.lock = threading.Lock()

    extract, module = ExtractStructure(tmp_path / "c"), Later()
    with pytest.warns(UserWarning, match="without what cannot be copied: lock"):
        fit(tmp_path, module, extract)
    assert extract.extracted.lock is None
    assert module.lock is not None
    assert isinstance(load_compressed(Module(), tmp_path / "c").net.conv2, nn.Sequential)


def test_a_failing_measurement_costs_a_warning(tmp_path, monkeypatch):
    def no_memory(*_):
        assert (tmp_path / "c" / "model.safetensors").is_file()  # saved before
        raise RuntimeError("no memory")

    monkeypatch.setattr("lowrank_pl.report._count_macs", no_memory)
    extract = ExtractStructure(tmp_path / "c", submodule="net")
    with pytest.warns(UserWarning, match="not measured: RuntimeError: no memory"):
        fit(tmp_path, Module(), extract)
    assert extract.report.dense.params > extract.report.compressed.params
    assert extract.report.dense.macs is None


def test_latency_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.report.BATCHES", (1,))
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", lambda functions, *_: [[1.0] for _ in functions])
    for latency in (True, False):
        extract = ExtractStructure(submodule="net", latency=latency)
        fit(tmp_path, Module(), extract)
        assert bool(extract.report.dense.latency_ms) == latency
    with pytest.raises(TypeError, match=r"latency.*5"):
        ExtractStructure(latency=5)


def test_non_leaf_tensors_under_any_name(tmp_path):
    class Keeps(Module):
        def training_step(self, batch, batch_idx):
            self._loss = super().training_step(batch, batch_idx)
            self.register_buffer("last", self._loss * 2)
            return self._loss

    extract = ExtractStructure()
    fit(tmp_path, Keeps(), extract)
    assert extract.extracted.last.is_leaf


# -- the whole network ---------------------------------------------------------------------------------------------


def test_a_module_that_is_compiled_as_a_whole(tmp_path):
    """Lightning keeps closures over the original on it, which a copy must not call."""
    torch._dynamo.reset()
    module, extract = Module(Net(norm=True)), ExtractStructure(tmp_path / "c")
    fit(tmp_path, torch.compile(module, backend="eager"), extract, recalibrate_bn=2)
    assert float(module.net.norm.running_mean.abs().max()) > 0
    with torch.no_grad():
        expected = copy.deepcopy(module.net).eval()(X)
        assert torch.allclose(extract.extracted.eval()(X), expected, atol=1e-5)
        before = extract.extracted(X)
        for p in extract.extracted.net.conv2.parameters():
            p.mul_(0)
        assert not torch.allclose(extract.extracted(X), before)
    module.zero_grad()
    loss = extract.extracted.training_step((X, torch.zeros(len(X), dtype=torch.long)), 0)
    loss.backward()
    assert all(p.grad is not None for p in extract.extracted.parameters())
    assert all(p.grad is None for p in module.parameters())
    again = load_compressed(Module(Net(norm=True)), tmp_path / "c").eval()
    assert torch.allclose(again(X), before)


class Closure(Module):
    """Its forward is a function on the instance that knows the original's network."""

    def __init__(self):
        super().__init__()
        net = self.net
        self.net.forward = lambda x: Net.forward(net, x)


def test_a_copy_that_calls_another_ones_layers_is_found(tmp_path):
    extract = ExtractStructure(tmp_path / "c", submodule="net")
    with pytest.warns(UserWarning, match=r"not the projected one: layer '(conv2|fc1)' runs in one of them alone"):
        fit(tmp_path, Closure(), extract)
    assert (tmp_path / "c" / "model.safetensors").is_file()


def test_outputs_of_whole_networks_are_compared(tmp_path):
    extract, module = ExtractStructure(submodule="net"), Module()
    fit(tmp_path, module, extract)
    assert difference(module.net, extract.extracted, (X,)) is None
    with torch.no_grad():
        extract.extracted.fc2.weight.add_(1)  # which is no layer that was replaced
    assert "outputs differ" in difference(module.net, extract.extracted, (X,))
    whole = ExtractStructure()
    fit(tmp_path, module, whole)
    assert difference(module, whole.extracted, (X,), "net") is None
    whole.extracted.net.fc2 = nn.Linear(3, 3)
    assert "does not run" in difference(module, whole.extracted, (X,), "net")


@pytest.mark.parametrize("kind", ["random", "threshold"])
def test_networks_that_differ_from_themselves_are_not_blamed(tmp_path, kind):
    class Unsteady(Net):
        def forward(self, x):
            y = super().forward(x)
            if kind == "random":
                return y + torch.rand((), generator=GENERATOR)
            return y + torch.where((y * 1e9).floor() % 2 == 0, 1.0, -1.0)  # the last bits decide

    extract, module = ExtractStructure(submodule="net"), Module(Unsteady())
    fit(tmp_path, module, extract)
    assert difference(module.net, extract.extracted, (X,)) is None


GENERATOR = torch.Generator().manual_seed(0)


# -- views of parameters -------------------------------------------------------------------------------------------


def test_a_view_of_a_parameter_is_handed_to_a_submodule(tmp_path):
    """As CaiT, SigLIP and Perceiver do; PyTorch's counter looked for the view's gradient function."""

    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(1, 2, 48))
            self.net, self.mix, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 4)

        def forward(self, x):
            x = self.net(x.flatten(1)[:, None, :48])
            return self.head(torch.tanh(x + self.mix(self.latents.expand(len(x), -1, -1))).mean(1))

    extract = ExtractStructure(submodule="net")
    fit(tmp_path, Module(Latents()), extract)
    factors = 2 * (48 + 48)
    assert extract.report.compressed.macs == factors + 2 * factors + 48 * 4  # `mix` runs on two tokens
    assert extract.report.dense.macs == 3 * 48 * 48 + 48 * 4


# -- other callbacks and trainers ----------------------------------------------------------------------------------


def test_pruning_in_the_same_fit(tmp_path):
    with pytest.raises(ValueError, match="DeepTwist and ModelPruning"):
        fit(tmp_path, Module(), ModelPruning("l1_unstructured", amount=0.5))


def test_pruning_by_hand_in_the_middle(tmp_path):
    class Prune(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                prune.l1_unstructured(pl_module.net.fc1, "weight", 0.5)

    with pytest.raises(TypeError, match=r"net\.fc1.*Parameter.*prune"):
        fit(tmp_path, Module(), Prune())


def test_lazy_layers_take_part(tmp_path):
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyConv2d(12, 3), nn.Flatten(), nn.LazyLinear(16), nn.LazyLinear(4))
    extract, module = ExtractStructure(submodule="net"), Module(lazy)
    fit(tmp_path, module, extract)
    assert [type(extract.extracted[i]) for i in (1, 3)] == [FactorChain, FactorChain]


def test_complex_layers_stay_dense(tmp_path):
    class Spectral(Net):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4, dtype=torch.complex64)
            self.modes = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x):
            return (self.mix(super().forward(x).to(torch.complex64)) * self.modes).abs()

    extract, module = ExtractStructure(tmp_path / "c", submodule="net"), Module(Spectral())
    fit(tmp_path, module, extract)
    assert extract.extracted.lowrank_pl_record["notes"]["mix"] == "its weight is complex"
    again = load_compressed(Spectral(), tmp_path / "c")
    assert torch.equal(again.modes, module.net.modes)
    assert F.mse_loss(again.eval()(X), module.net.eval()(X)) < 1e-8
    assert set(ranks(module.net).values()) == {2}


def test_strategies_of_the_other_package():
    class FSDPStrategy:
        pass

    class Pretended:
        strategy, precision = FSDPStrategy(), "32-true"

    with pytest.raises(ValueError, match=r"FSDPStrategy.*strategy='ddp'"):
        DeepTwist(2).setup(Pretended(), Module(), "fit")


def test_what_cannot_be_saved_is_said_at_setup(tmp_path):
    module = Module()
    module.net.register_buffer("modes", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"'modes' .* is torch\.complex128; what can be saved is float64"):
        fit(tmp_path, module, ExtractStructure(tmp_path / "c", submodule="net"))
    extract = ExtractStructure(submodule="net")
    fit(tmp_path, module, extract)
    with pytest.raises(ValueError, match=r"'modes'"):
        save_compressed(extract.extracted, tmp_path / "c")


def test_a_network_called_with_keywords_is_compared(tmp_path, monkeypatch):
    """The whole extracted network runs beside the projected one on the keywords that `training_step` gave."""

    class Keyed(Net):
        def forward(self, *, x, scale):
            return super().forward(x) * scale

    class ByKeywords(Module):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(x=batch[0], scale=2.0), batch[1])

    calls = []
    compare = lambda *args: (calls.append(args[2].kwargs), "a difference")[1]  # noqa: E731
    monkeypatch.setattr("lowrank_pl.callbacks.extract_structure.difference", compare)
    extract = ExtractStructure(submodule="net")
    with pytest.warns(UserWarning, match="not the projected one: a difference"):
        fit(tmp_path, ByKeywords(Keyed()), extract)
    assert [(set(kwargs), kwargs["scale"]) for kwargs in calls] == [({"x", "scale"}, 2.0)]
    assert extract.report.dense.macs > sum(layer.dense.macs for layer in extract.report.layers) * 0.99


def test_lazy_layers_that_run_later_are_waited_for(tmp_path):
    class Later(Net):
        def __init__(self):
            super().__init__()
            self.extra, self.calls = nn.LazyLinear(4), 0

        def forward(self, x):
            self.calls += self.training
            y = torch.tanh(super().forward(x))
            return self.extra(y) if self.calls != 1 else y

    twist = DeepTwist(2, "svd", FixedRank(2), Targets(skip_first=False, skip_last=False))
    quiet_trainer(tmp_path, twist, max_steps=4).fit(Module(Later()), loader())
    assert "net.extra" in twist.distortion.choices
