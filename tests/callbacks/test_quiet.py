"""Extra forward passes: batch norm statistics re-estimated, losses monitored, nothing else touched."""

import pytest
import torch
import torch.nn.functional as F
from nets import (
    EPOCH,
    TARGETS,
    Module,
    Net,
    StepData,
    TwoOptimizers,
    Weights,
    distance,
    images,
    loader,
    project_,
    quiet_trainer,
    svd,
    weights,
)
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import MeanMetric

from lowrank_pl import DeepTwist, FixedRank

RANK = FixedRank(2)


class Memory(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(step, metrics)]

    def of(self, prefix):
        found = {}
        for step, metrics in self.rows:
            for key, value in metrics.items():
                if key.startswith(prefix):
                    assert key not in found.setdefault(step, {})
                    found[step][key] = value
        return found


RANKS = {f"lowrank/rank/net.{name}": 2.0 for name in TARGETS}  # of a rule that sees shapes alone: known after a batch


def projected(state):
    net = Net(norm=True)
    net.load_state_dict(state)
    project_(net, svd)
    return net


# -- batch norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_statistics_of_the_first_batches(tmp_path, batches):
    """Plain averages over the first n training batches (all of them, where there are fewer)."""
    module, watch = Module(Net(norm=True, dropout=0.5)), Weights()
    callback = DeepTwist(4, "svd", RANK, recalibrate_bn=batches)
    quiet_trainer(tmp_path, callback, watch, max_epochs=1).fit(module, loader())
    net = projected(watch.after[EPOCH])
    x, _ = images()
    with torch.no_grad():
        inputs = [net.conv1(part).double() for part in x.split(4)[:batches]]
    mean = torch.stack([part.mean((0, 2, 3)) for part in inputs]).mean(0)
    variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in inputs]).mean(0)
    assert torch.allclose(module.net.norm.running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(module.net.norm.running_var.double(), variance, atol=1e-5)
    assert module.net.norm.momentum == 0.1
    same = {n: t for n, t in weights(net).items() if "running" not in n}
    assert distance({n: weights(module.net)[n] for n in same}, same) < 5e-6


def test_checkpoints_keep_the_old_statistics(tmp_path):
    module, watch = Module(Net(norm=True)), Weights()
    callback = DeepTwist(4, "svd", RANK, recalibrate_bn=2)
    save = ModelCheckpoint(tmp_path, save_last=True)
    loop = quiet_trainer(tmp_path, callback, watch, save, max_epochs=1, enable_checkpointing=True)
    loop.fit(module, loader())
    loop.save_checkpoint(tmp_path / "after.ckpt")
    after = watch.after[EPOCH]
    assert distance(weights(module.net), after) > 1e-3
    for name in ("last.ckpt", "after.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert distance({n.removeprefix("net."): t for n, t in state.items()}, after) == 0


def test_a_second_fit_goes_on_from_the_old_statistics(tmp_path):
    runs = []
    for batches in (0, 2):
        module, watch = Module(Net(norm=True)), Weights()
        loop = quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK, recalibrate_bn=batches), watch, max_epochs=1)
        loop.fit(module, loader())
        loop.fit_loop.max_epochs = 2
        loop.fit(module, loader())
        runs.append(watch.after)
    assert all(distance(runs[0][step], runs[1][step]) == 0 for step in range(1, 2 * EPOCH + 1))


def test_networks_without_batch_norm(tmp_path):
    module = Module()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK, recalibrate_bn=2), max_epochs=1).fit(module, loader())
    assert torch.linalg.matrix_rank(module.net.fc1.weight.detach().double(), rtol=1e-5) == 2


@pytest.mark.parametrize("argument", [{"monitor_loss": True}, {"recalibrate_bn": 1}])
def test_manual_optimization_is_refused_before_training(tmp_path, argument):
    """Both run `training_step` without training, and a manual one trains."""
    module = TwoOptimizers()
    module.net = Net(norm=True)
    before = weights(module.net)
    loop = quiet_trainer(tmp_path, DeepTwist(4, "svd", RANK, **argument), max_epochs=1)
    with pytest.raises(ValueError, match=next(iter(argument))):
        loop.fit(module, loader())
    assert distance(before, weights(module.net)) == 0


# -- losses --------------------------------------------------------------------------------------------------------


class Full(Module):
    """Batch norm, dropout, a metric, an attribute and logging of its own."""

    def __init__(self):
        super().__init__(Net(norm=True, dropout=0.5))
        self.metric, self.calls, self.kept = MeanMetric(), 0, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.calls += 1
        self.metric.update(loss.detach())
        self.kept.append(loss)  # with its graph: not a leaf
        self.log("train_loss", loss)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return {"loss": loss}


def test_monitoring_leaves_no_trace(tmp_path):
    runs = []
    for monitor in (False, True):
        torch.manual_seed(5)
        module, watch, logger = Full(), Weights(), Memory()
        callback = DeepTwist(2, "svd", RANK, monitor_loss=monitor)
        loop = quiet_trainer(tmp_path, callback, watch, logger=logger, max_epochs=2, log_every_n_steps=1)
        loop.fit(module, loader())
        runs.append((module, watch.after, logger, loop.callback_metrics, torch.get_rng_state()))
    (one, after, logs, metrics, rng), (other, *others) = runs
    assert all(distance(after[step], others[0][step]) == 0 for step in after)
    assert one.calls == other.calls == 12
    assert torch.equal(rng, others[3])
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in others[2].items()}
    assert logs.of("train_loss") == others[1].of("train_loss")
    assert float(one.metric.update_count) == float(other.metric.update_count)


def test_losses_before_and_after(tmp_path):
    """On the batch just trained on, with its own weights and the projected ones, in training mode."""
    module, watch, logger = Module(Net(norm=True)), Weights(), Memory()
    callback = DeepTwist(2, "svd", RANK, monitor_loss=True)
    loop = quiet_trainer(tmp_path, callback, watch, logger=logger, max_epochs=1, log_every_n_steps=1000)
    plain = Weights()
    loop.callbacks.insert(0, plain)  # before the distortion
    loop.fit(module, loader())
    rows = logger.of("lowrank/")
    assert rows.pop(1) == RANKS
    assert sorted(rows) == [2, 4, 6]
    x, y = images()
    for step, row in rows.items():
        assert set(row) == {"lowrank/loss_before", "lowrank/loss_after", "lowrank/delta_w"}
        i = (step - 1) * 4
        for key, state in (
            ("before", plain.after[step]),
            ("after", weights(projected(plain.after[step]))),
        ):
            net = Net(norm=True).train()
            net.load_state_dict(state)
            expected = float(F.cross_entropy(net(x[i : i + 4]), y[i : i + 4]))
            assert row[f"lowrank/loss_{key}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("every", [1, 7])
def test_delta_w_is_logged_at_each_distortion(tmp_path, every):
    module, logger = Module(), Memory()
    loop = quiet_trainer(tmp_path, DeepTwist(3, "svd", RANK), logger=logger, max_steps=7, log_every_n_steps=every)
    loop.fit(module, loader())
    rows = logger.of("lowrank/")
    assert rows.pop(1) == RANKS
    assert {3, 6} <= set(rows)
    assert all(set(row) == {"lowrank/delta_w"} and row["lowrank/delta_w"] > 0 for row in rows.values())


def test_delta_w_of_the_closing_distortion_is_logged(tmp_path):
    module, logger = Module(), Memory()
    quiet_trainer(tmp_path, DeepTwist(3, "svd", RANK), logger=logger, max_steps=7).fit(module, loader())
    assert sorted(logger.of("lowrank/delta_w")) == [3, 6, 7]


def test_training_steps_that_ask_the_trainer(tmp_path):
    """The copy that runs the extra passes belongs to the trainer too."""
    logger = Memory()
    callback = DeepTwist(3, "svd", RANK, monitor_loss=True, recalibrate_bn=1)
    module = StepData(Net(norm=True))
    quiet_trainer(tmp_path, callback, logger=logger, max_steps=4).fit(module, loader())
    assert logger.of("lowrank/loss_before")[3] != {}


def test_losses_under_bf16_autocast(tmp_path):
    module, logger = Module(), Memory()
    callback = DeepTwist(3, "svd", RANK, monitor_loss=True)
    loop = quiet_trainer(tmp_path, callback, logger=logger, max_steps=3, precision="bf16-mixed")
    loop.fit(module, loader())
    net = Net()
    net.load_state_dict(weights(module.net))
    x, y = images()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = float(F.cross_entropy(net(x[8:12]), y[8:12]))
    assert logger.of("lowrank/")[3]["lowrank/loss_after"] == pytest.approx(expected, rel=1e-6)


def test_steps_without_a_loss(tmp_path):
    """`training_step` may return None to skip a batch."""

    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    module = Skipping()
    loop = quiet_trainer(tmp_path, DeepTwist(2, "svd", RANK, monitor_loss=True), max_epochs=2)
    loop.fit(module, loader())
    assert isinstance(module.net.conv2, nn.Conv2d)
    assert torch.linalg.matrix_rank(module.net.fc1.weight.detach().double(), rtol=1e-5) == 2
