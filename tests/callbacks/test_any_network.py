"""Batches of any size and shape, keywords, layers that run now and then, several networks in one module, thawing."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import quiet_trainer, sgd
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import CostBudget, DeepTwist, EnergyThreshold, ExtractStructure, FixedRank, LearningCompression, Targets

ALL = Targets(skip_first=False, skip_last=False)


class Attention(nn.Module):
    """Called with keywords; a table of positions is made once for a batch; products of queries and keys in no layer."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 12))  # runs first, on [1, 9, 2]
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("table", torch.randn(1, 9, 2))

    def forward(self, hidden=None, mask=None):
        q, k, v = self.qkv(hidden + self.positions(self.table)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask)[:, 0]).mean(1)


MATH = partial(sdpa_kernel, SDPBackend.MATH)  # PyTorch's counter does not know the fused one of CPUs


def flops(net, **inputs):
    with torch.no_grad(), MATH(), FlopCounterMode(display=False) as counter:
        net(**inputs)
    return counter.get_total_flops()


class Keywords(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        scores = self.net(hidden=batch["x"], mask=None)
        return F.cross_entropy(scores @ scores.T @ scores, batch["y"])  # products of the loss are not the network's

    def configure_optimizers(self):
        return sgd([p for p in self.parameters() if p.requires_grad])


def tokens(batch, batches=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {"x": torch.randn(batch, 9, 12, generator=generator), "y": torch.zeros(batch, dtype=torch.long)}  # noqa: E731
    return DataLoader([draw() for _ in range(batches)], batch_size=None)


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", lambda functions, *_: [[1.0]] * len(functions))
    monkeypatch.setattr("lowrank_pl.report.BATCHES", (1, 32))


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_macs_for_one_input_at_any_batch_size(tmp_path, batch):
    torch.manual_seed(0)
    net = Attention()
    expected = flops(net, hidden=torch.randn(1, 9, 12)) / 2
    twist, extract = DeepTwist(2, "svd", FixedRank(3), ALL), ExtractStructure()
    quiet_trainer(tmp_path, twist, extract, max_steps=2).fit(Keywords(net), tokens(batch))
    assert extract.report.dense.macs == expected
    assert extract.report.compressed.macs == flops(extract.extracted.net, hidden=torch.randn(1, 9, 12)) / 2
    assert set(extract.report.dense.latency_ms) == {"1", "32"}
    assert sum(layer.dense.macs for layer in extract.report.layers) == expected - 2 * 9 * 9 * 12


def test_a_budget_is_of_the_whole_network(tmp_path):
    def ratio(rule):
        torch.manual_seed(0)
        extract = ExtractStructure(submodule="net")
        quiet_trainer(tmp_path, DeepTwist(2, "svd", rule, ALL), extract, max_steps=2).fit(
            Keywords(Attention()), tokens(4)
        )
        one = torch.randn(1, 9, 12)
        return flops(extract.extracted, hidden=one) / flops(Attention(), hidden=one)

    assert 0.68 < ratio(CostBudget("macs", 0.7)) <= 0.7
    assert ratio(CostBudget("macs", 0.7, of="layers")) > 0.72
    with pytest.raises(ValueError, match=r"smallest ranks cost 0\.\d+ of it; .* 0\.0000 are layers that stay dense, "
                       r"0\.2\d* what no layer covers \(of='layers'"):  # fmt: skip
        ratio(CostBudget("macs", 0.1))
    with pytest.raises(ValueError, match="`of` to be 'network' or 'layers'"):
        CostBudget("macs", 0.5, of="all")


class SequenceFirst(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch  # [7, 3, 12], [3]
        return F.cross_entropy(self.net(x).mean(0), y)

    def configure_optimizers(self):
        return sgd(self.parameters())


def test_a_batch_that_does_not_tell_its_size(tmp_path):
    data = DataLoader([(torch.randn(7, 3, 12), torch.zeros(3, dtype=torch.long))] * 2, batch_size=None)
    with pytest.raises(ValueError, match="leading sizes 3, 7: give `batch_size`"):
        quiet_trainer(tmp_path, DeepTwist(2, "svd"), max_steps=2).fit(SequenceFirst(), data)
    extract = ExtractStructure()
    quiet_trainer(tmp_path, DeepTwist(2, "svd", FixedRank(1), batch_size=3), extract, max_steps=2).fit(
        SequenceFirst(), data
    )
    assert extract.report.dense.macs == 7 * (120 + 40)
    with pytest.raises(ValueError, match="`batch_size`"):
        LearningCompression(1.0, batch_size=0, l_step_epochs=1)


class Turns(pl.LightningModule):
    """Layers take turns: `odd` runs on every second batch, on half of its inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.even, self.odd, self.never = (nn.Linear(12, 12) for _ in range(4))

    def training_step(self, batch, batch_idx):
        x = torch.tanh(self.first(batch["x"][:, 0]))
        x = self.odd(x[: len(x) // 2]) if batch_idx % 2 else self.even(x)
        return x.square().mean()

    def configure_optimizers(self):
        return sgd(self.parameters())


def test_layers_join_when_they_run(tmp_path):
    twist = DeepTwist(1, "svd", FixedRank(2), ALL)
    trainer = quiet_trainer(tmp_path, twist, max_steps=4)
    trainer.fit(Turns(), tokens(4, 4))
    assert [c.name for c in twist.plan.compressions] == ["first", "even", "odd"]
    assert twist.plan.dense == {"never": "never called in 4 batches"}
    assert {c.name: c.layer.macs for c in twist.plan.compressions} == {"first": 144, "even": 72, "odd": 36}
    assert twist.choices.keys() == {"first", "even", "odd"}
    assert torch.linalg.matrix_rank(trainer.lightning_module.odd.weight) == 2


@pytest.mark.parametrize("rule", [{"lambda_": 1e3}, {"budget": CostBudget("macs", 0.6)}])
def test_and_in_learning_compression(tmp_path, rule):
    lc = LearningCompression(**rule, targets=ALL, steps=4, l_step_steps=2, mu0=1.0)
    quiet_trainer(tmp_path, lc, **lc.length).fit(Turns(), tokens(4, 4))
    assert lc.finished
    assert lc.state.choices.keys() == {"first", "even", "odd"}
    assert len(set(lc.state.choices.values())) == 1 or "budget" in rule


def test_a_run_that_stops_before_all_have_joined_goes_on(tmp_path):
    kept = []
    for stop in (1, 4):
        twist = DeepTwist(3, "svd", CostBudget("params", 0.6), ALL)
        path = tmp_path / "last.ckpt"
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path, twist, max_steps=stop)
        trainer.fit(Turns(), tokens(4, 4), ckpt_path=path if kept else None)
        trainer.save_checkpoint(path)
        kept.append(twist)
    assert [c.name for c in kept[0].plan.compressions] == ["first", "even"]
    assert [c.name for c in kept[1].plan.compressions] == ["first", "even", "odd"]
    assert kept[1].trace.batches == 4


class StudentAndTeacher(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(2)
        )
        self.teacher.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x = batch["x"][:, 0]
        return F.mse_loss(self.student(x), self.teacher(x))

    configure_optimizers = Turns.configure_optimizers


def test_each_network_has_its_own_last_layer_and_budget(tmp_path):
    twist = DeepTwist(1, "svd", CostBudget("macs", 0.7))
    quiet_trainer(tmp_path, twist, max_steps=1).fit(StudentAndTeacher(), tokens(4))
    assert [c.name for c in twist.plan.compressions] == ["student.0", "student.2"]
    assert twist.plan.dense["student.3"] == "the last linear layer of student"
    assert twist.plan.dense["teacher.3"] == "the last linear layer of teacher"
    spent = sum(c.cost(lambda layer: layer.macs, twist.choices[c.name]) for c in twist.plan.compressions)
    assert 0.6 * 3 * 144 < spent + 144 <= 0.7 * 3 * 144  # the teacher's are not in it


class Gan(StudentAndTeacher):
    """The generator's step comes first: what runs behind it is the discriminator all the same."""

    def __init__(self):
        super().__init__()
        self.teacher.requires_grad_(True)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x = batch["x"][:, 0]
        loss = self.teacher(self.student(torch.randn_like(x))).mean() - self.teacher(x).mean()
        self.manual_backward(loss)
        self.optimizers().step()


def test_a_generator_and_its_discriminator(tmp_path):
    twist = DeepTwist(1, "svd", FixedRank(2))
    quiet_trainer(tmp_path, twist, max_steps=1).fit(Gan(), tokens(4))
    assert set(twist.plan.dense) == {"student.3", "teacher.3"}


class Backbone(pl.LightningModule):
    """An encoder and, behind it, a head, called one by one: one network."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self.head = nn.Linear(12, 4)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch["x"][:, 0]).relu()), batch["y"])

    configure_optimizers = Keywords.configure_optimizers


def test_encoder_and_head_are_one_network(tmp_path):
    twist = DeepTwist(1, "svd", FixedRank(2))
    quiet_trainer(tmp_path, twist, max_steps=1).fit(Backbone(), tokens(4))
    assert twist.plan.dense == {"head": "the last linear layer"}


@pytest.mark.parametrize("make", [lambda: DeepTwist(1, "svd", EnergyThreshold(0.6), ALL),
                                  lambda: LearningCompression(1e3, targets=ALL, steps=4, l_step_steps=3)])  # fmt: skip
def test_frozen_layers_take_part_when_they_thaw(tmp_path, make):
    callback, extract = make(), ExtractStructure()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False, lambda_func=lambda epoch: 1.0)
    trainer = quiet_trainer(tmp_path, thaw, callback, extract, max_epochs=3)
    with pytest.warns() as caught:
        trainer.fit(Backbone(), tokens(4))
    assert [c.name for c in callback.plan.compressions] == ["backbone.0", "backbone.2", "head"]
    assert set(callback.distortion.choices) == {"backbone.0", "backbone.2", "head"}
    assert "frozen" not in str([layer.note for layer in extract.report.layers])
    assert caught


def test_a_part_of_which_the_parts_are_called(tmp_path):
    """Its totals are theirs: products in no layer, and time."""

    class Parts(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"body": Attention(), "head": nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))})

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net["head"](self.net["body"](hidden=batch["x"])), batch["y"])

        def configure_optimizers(self):
            return sgd(self.parameters())

    module, extract = Parts(), ExtractStructure(submodule="net")
    quiet_trainer(tmp_path, DeepTwist(2, "svd", FixedRank(3), ALL), extract, max_steps=2).fit(module, tokens(4))
    one = torch.randn(1, 9, 12)
    expected = flops(module.net["body"], hidden=one) / 2 + 12 * 8 + 8 * 4
    assert extract.report.dense.macs == expected
    assert extract.report.dense.latency_ms == {"1": 2.0, "32": 2.0}  # of two


class Frames(pl.LightningModule):
    """Inputs of five frames, which the network gets as five times as many images."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0].flatten(0, 1)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("submodule", ["net", None])
def test_frames_in_the_batch_belong_to_their_inputs(tmp_path, submodule):
    data = DataLoader(TensorDataset(torch.randn(8, 5, 3, 8, 8)), 4)
    extract = ExtractStructure(submodule=submodule, latency=False)
    module = Frames()
    quiet_trainer(tmp_path, DeepTwist(2, "svd"), extract, max_epochs=1).fit(module, data)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.net(torch.randn(5, 3, 8, 8))
    assert extract.report.dense.macs == counter.get_total_flops() // 2
