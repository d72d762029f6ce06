"""Fits in the metric of what layers are given in training: against bare loops, resumed, in two processes."""

import copy
import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from killing import in_two_processes
from nets import (
    EPOCH,
    SIZE,
    Module,
    Net,
    StepData,
    TwoOptimizers,
    Weights,
    distance,
    images,
    loader,
    quiet_trainer,
    sgd,
    weights,
)
from pytorch_lightning.callbacks import BackboneFinetuning, ModelCheckpoint
from test_any_network import ALL, Backbone, Turns, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter

from lowrank_pl import CostBudget, DeepTwist, EnergyThreshold, FixedRank, LearningCompression, TrainingMetric
from lowrank_pl.callbacks.learning_rate import stability

EVERYWHERE = 64  # places: all that there are in these images
KINDS = ("inputs", "inputs_and_gradients")


def twist(metric="inputs", rank=None, S_D=4):
    return DeepTwist(S_D, "svd", rank or FixedRank(2), metric=metric)


def learn(metric="inputs", **settings):
    settings = {"steps": 5, "l_step_steps": 3, "mu0": 0.02, "growth": 1.3} | settings
    return LearningCompression(60.0, metric=metric, **settings)


def sums_of(callback, kind="inputs"):
    return getattr(callback._heard.moments, kind)


def recorded(net, x):
    """The rows that `conv2` and `fc1` are given, float64."""
    given = {}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: given.update({name: args[0]}))
        for name in ("conv2", "fc1")
    ]
    yield from (net(x),)
    for handle in handles:
        handle.remove()
    patches = F.unfold(given["conv2"].detach().double(), 3, padding=1, stride=2)
    yield {"conv2": patches.transpose(1, 2).flatten(0, 1), "fc1": given["fc1"].detach().double()}


def bare_loop(net, steps, every, decay, S_D, rank=2):
    """Weights after every step, distorted after every S_D steps in the running second moment of the inputs."""
    net, after, moments = copy.deepcopy(net).train(), {}, {}
    optimizer, (x, y) = sgd(net.parameters()), images()
    for step in range(steps):
        i = step % EPOCH * SIZE
        run = recorded(net, x[i : i + SIZE])
        F.cross_entropy(next(run), y[i : i + SIZE]).backward()
        rows = next(run)
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            for name, given in rows.items():
                second, count = moments.get(name, (0.0, 0.0))
                moments[name] = given.T @ given + decay * second, len(given) + decay * count
        if (step + 1) % S_D == 0:
            for name, (second, count) in moments.items():
                a = second / count
                a = a + 1e-6 * a.trace() / len(a) * torch.eye(len(a))
                weight = net.get_submodule(name).weight
                w = weight.detach().double().flatten(1)
                _, vectors = torch.linalg.eigh(w @ a @ w.T)
                basis = vectors[:, -rank:]
                weight.data.copy_((basis @ basis.T @ w).view_as(weight))
        after[step + 1] = weights(net)
    return after


@pytest.mark.parametrize("every", [1, 3])
def test_like_a_bare_loop(tmp_path, every):
    callback, watch = twist(TrainingMetric(every=every, decay=0.6, places=EVERYWHERE)), Weights()
    quiet_trainer(tmp_path, callback, watch, max_epochs=2).fit(Module(), loader())
    expected = bare_loop(Net(), 2 * EPOCH, every, 0.6, 4)
    assert max(distance(watch.after[step], expected[step]) for step in expected) < 1e-4
    plain = Weights()
    quiet_trainer(tmp_path, DeepTwist(4, "svd", FixedRank(2)), plain, max_epochs=2).fit(Module(), loader())
    assert distance(watch.after[4], plain.after[4]) > 1e-2


def test_what_listening_multiplies_is_not_the_networks(tmp_path):
    """The first batch is counted, too."""
    costs = []
    for metric in ("weights", KINDS[1]):
        callback = DeepTwist(4, "svd", CostBudget("macs", 0.8), metric=metric)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*multiply-adds")
            quiet_trainer(tmp_path, callback, max_epochs=1).fit(Module(), loader())
        trace = callback.trace
        costs.append((trace.rest, {c.name: c.layer.macs for c in callback.plan.compressions}))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("make", [twist, learn])
def test_the_first_act_has_heard_something(tmp_path, make):
    """Before the first optimizer step in learning-compression, after it here."""
    callback = make("inputs_and_gradients", S_D=1) if make is twist else make("inputs_and_gradients")
    seen = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if callback.plan is not None:
                seen.append(callback.metrics(callback.plan))

    quiet_trainer(tmp_path, callback, Look(), max_steps=2).fit(Module(), loader())
    if make is learn:
        assert callback.state.metrics.keys() == {"net.conv2", "net.fc1"}
    assert seen[0].keys() == {"net.conv2", "net.fc1"}
    assert all(metric.inputs is not None and metric.outputs is not None for metric in seen[0].values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [twist, learn])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, make, kind):
    """Bit by bit, from every step: between two hearings, at one, and at the first batch."""
    metric = TrainingMetric(kind, every=5)

    def run(root, ckpt=None):
        callback, watch, module = make(metric), Weights(), StepData()
        every = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        loop = quiet_trainer(root, callback, watch, every, max_steps=12, max_epochs=-1, enable_checkpointing=True)
        loop.fit(module, loader(), loader(1), ckpt_path=ckpt, weights_only=True)
        return watch.after, weights(module.net), callback

    after, end, callback = run(tmp_path / "whole")
    for step in range(1, 12):
        later, again, other = run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert sorted(later) == list(range(step + 1, 13))
        assert all(distance(state, after[k]) == 0 for k, state in later.items())
        assert distance(again, end) == 0
        for of in ("inputs", "outputs"):
            mine, theirs = sums_of(callback, of), sums_of(other, of)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[n][0], theirs[n][0]) and mine[n][1] == theirs[n][1] for n in mine)


@pytest.mark.parametrize("make", [twist, learn])
def test_resuming_in_another_metric_is_warned_of(tmp_path, make):
    loop = quiet_trainer(tmp_path, make("weights"), max_steps=7)
    loop.fit(StepData(), loader())
    loop.save_checkpoint(tmp_path / "7.ckpt")
    callback = make("inputs")
    with pytest.warns(UserWarning, match="metric=TrainingMetric"):
        quiet_trainer(tmp_path, callback, max_steps=11, max_epochs=-1).fit(
            StepData(), loader(), ckpt_path=tmp_path / "7.ckpt", weights_only=True
        )
    assert sums_of(callback).keys() == {"net.conv2", "net.fc1"}


@pytest.mark.parametrize("make", [DeepTwist, lambda **a: LearningCompression(1.0, l_step_epochs=1, **a)])
@pytest.mark.parametrize("metric", ["gradients", None, 3])
def test_unknown_metrics(make, metric):
    with pytest.raises(ValueError, match="`metric` to be 'weights', 'inputs' or 'inputs_and_gradients' but got"):
        make(metric=metric)


@pytest.mark.parametrize("settings", [{"of": "weights"}, {"every": 0}, {"decay": 1.0}, {"places": 0}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=f"Expected argument `{next(iter(settings))}`"):
        TrainingMetric(**settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}], ids=str
)
@pytest.mark.parametrize("make", [twist, learn])
def test_ways_of_training(tmp_path, make, arguments, kind):
    """Of a step's micro-batches the first is heard."""
    callback = make(TrainingMetric(kind, every=2, decay=0.5, places=EVERYWHERE))
    quiet_trainer(tmp_path, callback, max_steps=4, max_epochs=-1, **arguments).fit(Module(), loader())
    for of in ("inputs",) if kind == "inputs" else ("inputs", "outputs"):
        assert {n: count for n, (_, count) in sums_of(callback, of).items()} == {"net.conv2": 96.0, "net.fc1": 6.0}
    assert callback.distortion is not None


def test_manual_optimization(tmp_path):
    for callback in (twist("inputs_and_gradients"), learn("inputs_and_gradients")):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(TwoOptimizers(), loader())
        assert sums_of(callback, "outputs").keys() == {"net.conv2", "net.fc1"}


def test_compiled(tmp_path):
    """The same trajectory, and no graphs more than without."""
    graphs, ends = [], []
    for compiled, metric in ((True, "weights"), (True, TrainingMetric(KINDS[1], every=3)), (False, None)):
        torch._dynamo.reset()
        counter, module = CompileCounter(), Module(Net(norm=True))
        if compiled:
            module.net = torch.compile(module.net, backend=counter)
        metric = metric or TrainingMetric(KINDS[1], every=3)
        watch = Weights()
        quiet_trainer(tmp_path, twist(metric), watch, max_epochs=2).fit(module, loader(), loader(1))
        graphs.append(counter.frame_count)
        ends.append(watch.after)
    assert 0 < graphs[1] <= graphs[0]
    assert max(distance(ends[1][step], ends[2][step]) for step in ends[2]) < 1e-4


class Poisoned(StepData):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            with torch.no_grad():
                self.net.conv1.bias[0] = float("nan")
        return super().training_step(batch, batch_idx)


def test_activations_that_are_not_finite(tmp_path):
    module = Poisoned()
    callback = twist(TrainingMetric(every=3), S_D=50)
    with pytest.raises(ValueError, match=r"Layer 'net\.conv2': expected finite inputs"):
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_hooks_live_for_one_batch(tmp_path):
    hooks = {}

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hooks[trainer.global_step] = len(pl_module.net.fc1._forward_pre_hooks)

        def on_train_batch_end(self, trainer, pl_module, *_):
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in pl_module.modules())

    callback = twist(TrainingMetric(every=4))
    quiet_trainer(tmp_path, callback, Count(), max_epochs=2).fit(Module(), loader())
    assert [step for step, n in hooks.items() if n] == [0, 4, 8]


def test_what_is_deployed_is_found_by_the_metric(tmp_path):
    """Ranks are those of the metric's spectrum, once, and provisional ones of a validation before that too."""
    callback = twist(rank=EnergyThreshold(0.9))
    quiet_trainer(tmp_path, callback, max_epochs=2, val_check_interval=1).fit(Module(), loader(), loader(1))
    first = callback.choices
    plain = DeepTwist(4, "svd", EnergyThreshold(0.9))
    quiet_trainer(tmp_path, plain, max_epochs=2).fit(Module(), loader())
    assert first != plain.choices
    assert all(choice.rank[0] <= plain.choices[name].rank[0] for name, choice in first.items())


@pytest.mark.parametrize("make", [lambda: DeepTwist(1, "svd", FixedRank(2), ALL, metric="inputs_and_gradients"),
                                  lambda: LearningCompression(1e3, targets=ALL, steps=4, l_step_steps=1,
                                                              metric="inputs")])  # fmt: skip
def test_layers_that_run_later(tmp_path, make):
    """They have a metric in the very batch after which they take part; of the layer that never runs none is missed."""
    callback, found = make(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            metrics = callback.metrics(callback.plan)
            found.append({c.name: c.name in metrics for c in callback.plan.compressions})

    quiet_trainer(tmp_path, callback, Look(), max_steps=4).fit(Turns(), tokens(4, 4))
    assert set(found[-1]) == {"first", "even", "odd"}
    assert all(all(each.values()) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_thaw(tmp_path, kind):
    callback = DeepTwist(1, "svd", EnergyThreshold(0.6), ALL, metric=TrainingMetric(kind, every=1000))
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False, lambda_func=lambda epoch: 1.0)
    with pytest.warns():
        quiet_trainer(tmp_path, thaw, callback, max_epochs=3).fit(Backbone(), tokens(4))
    metrics = callback.metrics(callback.plan)
    assert metrics.keys() == {"backbone.0", "backbone.2", "head"}
    assert all((metric.outputs is not None) == (kind == KINDS[1]) for metric in metrics.values())


def test_batches_that_are_skipped(tmp_path):
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < 2 else super().training_step(batch, batch_idx)

    callback = twist(S_D=1)
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(Skips(), loader())
    assert sums_of(callback).keys() == {"net.conv2", "net.fc1"}


def test_metrics_are_as_stiff_as_gradient_descent_can_bear(tmp_path, monkeypatch):
    """At a mu that is far from too much in Frobenius norm, and with the metric as it is."""
    callback = learn(mu0=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*what gradient descent")
        quiet_trainer(tmp_path, callback, max_steps=1).fit(Module(), loader())
    (optimizer,) = callback._module.trainer.optimizers
    largest = max(metric.largest for metric in callback.state.metrics.values())
    assert 1 < largest == pytest.approx(callback.state.stiffest)
    assert stability(optimizer, largest * callback.schedule.mu(callback.schedule.steps - 1)) == pytest.approx(0.5)
    monkeypatch.setattr("lowrank_pl.callbacks.learning_compression.stiffest", lambda *_: math.inf)
    with pytest.warns(UserWarning, match="metric's largest eigenvalue, .* is .* of what gradient descent"):
        quiet_trainer(tmp_path, learn(mu0=1.0), max_steps=1).fit(Module(), loader())


class Mixture(nn.Module):
    """After the first batch `other` runs in the second process alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = (nn.Linear(12, 12) for _ in range(3))
        self.second = False

    def forward(self, x):
        x = torch.tanh(self.first(x.flatten(1)[:, :12]))
        unused = 0 * (self.other.weight.sum() + self.other.bias.sum())  # DDP wants a gradient of all
        return self.last(torch.tanh(self.other(x)) if self.second else x + unused)[:, :4]


class Note(pl.Callback):
    def __init__(self, folder, callback):
        self.folder, self.callback, self.given = folder, callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net.second = trainer.global_rank == 1 or trainer.global_step == 0
        self.given.append(batch[0].flatten(1)[:, :12].double())

    def on_fit_end(self, trainer, pl_module):
        sums = {kind: {n: [*v] for n, v in sums_of(self.callback, kind).items()} for kind in ("inputs", "outputs")}
        note = {"given": self.given, "weights": weights(pl_module.net), **sums}
        torch.save(note, self.folder / f"rank{trainer.global_rank}.pt")


def in_each(folder):
    metric = TrainingMetric("inputs_and_gradients", every=1, decay=0.5)
    for name, callback in (
        ("twist", DeepTwist(2, "svd", FixedRank(2), ALL, metric=metric)),
        ("learn", LearningCompression(1e3, targets=ALL, steps=3, l_step_steps=1, mu0=0.02, metric=metric)),
    ):
        (folder / name).mkdir(exist_ok=True)
        loop = quiet_trainer(folder, callback, Note(folder / name, callback), strategy="ddp", devices=2, max_steps=3)
        loop.fit(Module(Mixture()), loader())


@pytest.mark.timeout(300)
def test_all_processes_hear_the_same(tmp_path):
    in_two_processes(in_each, tmp_path)
    for name in ("twist", "learn"):
        one, two = (torch.load(tmp_path / name / f"rank{i}.pt", weights_only=True) for i in (0, 1))
        assert distance(one["weights"], two["weights"]) == 0
        expected = 0.0
        for given in zip(one["given"], two["given"], strict=True):
            rows = torch.cat(given)
            expected = 0.5 * expected + rows.T @ rows
        if name == "twist":
            torch.testing.assert_close(one["inputs"]["net.first"][0][0], expected)
        assert {"net.first", "net.last"} <= one["inputs"].keys() == one["outputs"].keys()
        for kind in ("inputs", "outputs"):
            for layer, (total, count) in one[kind].items():
                other, again = two[kind][layer]
                assert torch.equal(total, other)
                assert count == again


def test_a_budget_in_both(tmp_path):
    for kind in KINDS:
        callback = LearningCompression(
            budget=CostBudget("macs", 0.6), steps=4, l_step_steps=2, mu0=0.02, growth=1.2, metric=kind
        )
        quiet_trainer(tmp_path, callback, **callback.length).fit(Module(), loader())
        assert callback.finished
