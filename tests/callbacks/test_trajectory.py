"""Training with DeepTwist against a bare PyTorch loop that projects with NumPy's SVD."""

import math
from dataclasses import dataclass
from typing import final

import pytest
import pytorch_lightning as pl
import torch
from nets import (
    EPOCH,
    PROJECTIONS,
    Module,
    Net,
    TwoOptimizers,
    Weights,
    bare_loop,
    distance,
    loader,
    project_,
    quiet_trainer,
    ranks,
    weights,
)
from torch import nn

from lowrank_pl import SVD, BlockSVD, DeepTwist, EnergyThreshold, FixedRank, SpatialSVD, Targets, TiledSVD
from lowrank_pl.decompositions import Choice
from lowrank_pl.ranks import RankRule

METHODS = {
    "svd": "svd",
    "spatial_svd": SpatialSVD(),
    "tiled_svd": TiledSVD(tile=8),
    "block_svd": BlockSVD(channels=4),
}


def train(root, callback, module=None, **arguments):
    module, after = Module() if module is None else module, Weights()
    loop = quiet_trainer(root, callback, after, **arguments)
    loop.fit(module, loader())
    return module, after.after


@pytest.mark.parametrize("S_D", [1, 3, 7])
@pytest.mark.parametrize("method", list(METHODS))
def test_like_a_bare_loop(tmp_path, method, S_D):
    module, after = train(tmp_path, DeepTwist(S_D, METHODS[method], FixedRank(2)), max_steps=10)
    expected = bare_loop(Net(), 10, range(S_D, 11, S_D), PROJECTIONS[method])
    assert after.keys() == expected.keys()
    assert max(distance(after[step], expected[step]) for step in after) < 5e-6
    closed = Net()
    closed.load_state_dict(expected[10])
    project_(closed, PROJECTIONS[method])  # nothing new where step 10 was one of them
    assert distance(weights(module.net), weights(closed)) < 5e-6


def test_counts_optimizer_steps_under_accumulation(tmp_path):
    callback = DeepTwist(2, "svd", FixedRank(2))
    _, after = train(tmp_path, callback, max_epochs=3, accumulate_grad_batches=3, gradient_clip_val=0.5)  # six steps
    expected = bare_loop(Net(), 6, (2, 4, 6), PROJECTIONS["svd"], accumulate=3, clip=0.5)
    assert after.keys() - {0} == expected.keys()
    assert max(distance(after[step], expected[step]) for step in expected) < 5e-6


def test_last_batches_of_an_epoch_that_do_not_fill_an_accumulation(tmp_path):
    """Six batches by four: steps after batches 4 and 6 of each epoch."""
    module, after = train(tmp_path, DeepTwist(3, "svd", FixedRank(2)), max_epochs=2, accumulate_grad_batches=4)
    net, low = Net(), []
    for step in (1, 2, 3, 4):
        net.load_state_dict(after[step])
        low.append(set(ranks(net).values()) == {2})
    assert low == [False, False, True, False]
    assert set(ranks(module.net).values()) == {2}


def test_bf16_autocast(tmp_path):
    module, after = train(tmp_path, DeepTwist(3, "svd", FixedRank(2)), max_steps=8, precision="bf16-mixed")
    expected = bare_loop(Net(), 8, (3, 6), PROJECTIONS["svd"], autocast=True)
    assert max(distance(after[step], expected[step]) for step in after) < 2e-3  # bf16 rounds 1e-6 apart to 4e-3
    assert set(ranks(module.net).values()) == {2}


def test_two_optimizers_advance_the_step_by_two(tmp_path):
    """S_D = 3 in optimizer steps: due after steps 4, 6, 10, 12 of 2, 4, 6, ..., 12."""
    callback = DeepTwist(3, "svd", FixedRank(2))
    _, after = train(tmp_path, callback, TwoOptimizers(), max_epochs=1)
    low = {}
    for step, state in after.items():
        net = Net()
        net.load_state_dict(state)
        low[step] = set(ranks(net).values()) == {2}
    assert low == {2: False, 4: True, 6: True, 8: False, 10: True, 12: True}


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}])
def test_optimizer_state_is_untouched(tmp_path, options):
    """Adam's moments are those of a loop that projects, in the same objects, for the same parameters."""

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01, **options)

    class Identity(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            seen.append([(id(p), p.data_ptr(), id(state[p]["exp_avg"]), id(state[p])) for p in pl_module.parameters()])

    seen, module = [], Module(optimizer=adam)
    parameters = [id(p) for p in module.parameters()]
    loop = quiet_trainer(tmp_path, DeepTwist(2, "svd", FixedRank(2)), Identity(), max_steps=7)
    loop.fit(module, loader())
    assert parameters == [id(p) for p in module.parameters()]
    assert all(entry == seen[0] for entry in seen)
    expected = bare_loop(Net(), 7, (2, 4, 6, 7), PROJECTIONS["svd"], optimizer=adam)
    assert distance(weights(module.net), expected[7]) < 5e-6  # step 7: the closing one, whatever the optimizer


def test_optimizers_that_write_through_data(tmp_path):
    """`p.data.add_` is not counted in `p._version`; training ends on a distortion all the same."""

    class Old(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            loss = closure()
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)
            return loss

    module, _ = train(tmp_path, DeepTwist(3, "svd", FixedRank(2)), Module(optimizer=Old), max_steps=4)
    assert set(ranks(module.net).values()) == {2}


def test_nothing_but_the_targets_changes(tmp_path):
    """With rank and structure that keep the weights dense, training is the plain one bit for bit."""
    callback = DeepTwist(1, "svd", FixedRank(10**6))
    module, after = train(tmp_path, callback, max_steps=5)
    plain = Module()
    watch = Weights()
    quiet_trainer(tmp_path, watch, max_steps=5).fit(plain, loader())
    assert all(distance(after[step], watch.after[step]) == 0 for step in watch.after)
    assert distance(weights(module.net), weights(plain.net)) == 0


def test_scheduler_and_random_state_are_those_of_the_plain_run(tmp_path):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    states = []
    for callbacks in ([], [DeepTwist(2, "svd", FixedRank(2), monitor_loss=True, recalibrate_bn=1)]):
        pl.seed_everything(3, verbose=False)
        module = Scheduled(Net(norm=True, dropout=0.5))
        loop = quiet_trainer(tmp_path, *callbacks, max_epochs=2)
        loop.fit(module, loader())
        states.append((torch.get_rng_state(), loop.optimizers[0].param_groups[0]["lr"]))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


# -- how often the rule is asked -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class Counting(RankRule):
    """Notes how many layers it was asked for, each time. It might look at weights."""

    asked: list

    def __call__(self, problems, error_weight=1.0, others=()):
        self.asked.append(sorted(p.name.rpartition(".")[2] for p in problems))
        return [Choice(p.decomposition, (2,) * len(p.full)) for p in problems]


class Projections(DeepTwist):
    """Notes after which step it projected, and for what."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.projected = []

    def project(self, trainer, plan, occasion):
        self.projected.append((trainer.global_step, occasion))
        return super().project(trainer, plan, occasion)


def test_the_rule_is_asked_once(tmp_path):
    rule = Counting([])
    callback = Projections(3, "svd", rule)
    train(tmp_path, callback, max_steps=8)
    assert callback.projected == [(3, "training"), (6, "training"), (8, "end")]
    assert rule.asked == [["conv2", "fc1"]]  # at step 3


def test_a_network_distorted_at_this_step_is_not_distorted_again(tmp_path):
    rule = Counting([])
    module, callback = Module(), Projections(3, "svd", rule)
    loop = quiet_trainer(tmp_path, callback, max_steps=EPOCH)  # ends at a multiple of 3, after a validation there
    loop.fit(module, loader(), loader(1))
    after = weights(module.net)
    assert callback.projected == [(3, "training"), (6, "training")]
    loop.test(module, loader(1), verbose=False)
    assert callback.projected == [(3, "training"), (6, "training")]
    assert len(rule.asked) == 1
    assert distance(after, weights(module.net)) == 0


def test_a_threshold_does_not_shrink_what_it_has_projected(tmp_path):
    """A second projection at 80 % would lower the rank again (facts: 59, 55, 52, 49)."""
    module, callback = Module(), DeepTwist(5, "svd", EnergyThreshold(0.6))
    loop = quiet_trainer(tmp_path, callback, max_steps=5)
    loop.fit(module, loader(), loader(1))
    before = ranks(module.net)
    with callback.training_weights():
        pass
    loop.test(module, loader(1), verbose=False)
    assert ranks(module.net) == before == {f"{n}.weight": c.rank[0] for n, c in _inner(callback.distortion.choices)}
    assert callback.is_projected()


def _inner(chosen):
    return [(name.removeprefix("net."), choice) for name, choice in chosen.items()]


def test_mappings_give_every_layer_its_own(tmp_path):
    method = {"*.conv2": SpatialSVD(), "*": SVD()}
    rank = {"*.conv2": FixedRank(3), "*.fc1": FixedRank(1)}
    module, _ = train(tmp_path, DeepTwist(4, method, rank), max_steps=4)
    t, s, h, w = module.net.conv2.weight.shape
    spatial = module.net.conv2.weight.detach().double().permute(0, 3, 1, 2).reshape(t * w, s * h)
    assert torch.linalg.matrix_rank(spatial, rtol=1e-5) == 3
    assert ranks(module.net)["fc1.weight"] == 1


def test_delta_w_is_the_papers(tmp_path):
    before = bare_loop(Net(), 3, (), None)[3]
    callback = DeepTwist(3, "svd", FixedRank(2), Targets(include=["*.conv2"]))
    train(tmp_path, callback, max_steps=3)
    weight = before["conv2.weight"].double()
    expected = (weight - PROJECTIONS["svd"](weight, 2)).square().sum() / weight.numel()
    assert math.isclose(callback.distortion.delta_w, float(expected), rel_tol=1e-4)


# -- what ends a fit -----------------------------------------------------------------------------------------------


class StopAt(pl.Callback):
    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.how(trainer)


def _stop(trainer):
    trainer.should_stop = True


@pytest.mark.parametrize("end", ["epochs", "steps", "should_stop", "early stopping"])
def test_every_end_is_a_distortion(tmp_path, end):
    extra, limits = [], {"max_epochs": 3}
    if end == "steps":
        limits = {"max_steps": 4}
    if end == "should_stop":
        extra = [StopAt(4, _stop)]
    if end == "early stopping":
        extra = [pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0, verbose=False)]
    module = Module()
    quiet_trainer(tmp_path, DeepTwist(5, "svd", FixedRank(2)), *extra, **limits).fit(module, loader(), loader(1))
    assert set(ranks(module.net).values()) == {2}


class Interrupted(Module):
    def __init__(self, error, step=5):
        super().__init__()
        self.error, self.step = error, step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.step:
            raise self.error
        return super().training_step(batch, batch_idx)


def test_an_interrupt_ends_on_a_distortion(tmp_path):
    module = Interrupted(KeyboardInterrupt())
    with pytest.raises(SystemExit):
        train(tmp_path, DeepTwist(4, "svd", FixedRank(2)), module)
    expected = bare_loop(Net(), 5, (4, 5), PROJECTIONS["svd"])[5]
    assert distance(weights(module.net), expected) < 5e-6


def test_a_real_error_leaves_the_training_weights(tmp_path):
    module = Interrupted(RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, DeepTwist(4, "svd", FixedRank(2)), module)
    expected = bare_loop(Net(), 5, (4,), PROJECTIONS["svd"])[5]
    assert distance(weights(module.net), expected) < 5e-6


def test_an_error_in_the_first_batch_leaves_no_hooks(tmp_path):
    module = Interrupted(RuntimeError("out of luck"), step=0)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, DeepTwist(4, "svd", FixedRank(2)), module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_hooks_live_for_one_batch(tmp_path):
    class Hooks(pl.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            counts.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()))

    counts = []
    train(tmp_path, DeepTwist(4, "svd", FixedRank(2)), max_steps=3)
    loop = quiet_trainer(tmp_path, DeepTwist(4, "svd", FixedRank(2)), Hooks(), max_steps=3)
    loop.fit(Module(), loader())
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_a_second_fit_goes_on_from_the_training_weights(tmp_path):
    module, callback, watch = Module(), DeepTwist(4, "svd", FixedRank(2)), Weights()
    loop = quiet_trainer(tmp_path, callback, watch, max_epochs=1)
    loop.fit(module, loader())
    loop.fit_loop.max_epochs = 2
    last = watch.after[EPOCH]

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.seen = weights(pl_module.net)

    start = Start()
    loop.callbacks.insert(0, start)
    loop.fit(module, loader())
    assert distance(start.seen, last) == 0
    assert set(ranks(module.net).values()) == {2}
    low = []
    for step in sorted(watch.after):
        net = Net()
        net.load_state_dict(watch.after[step])
        low.append(set(ranks(net).values()) == {2})
    assert [i + 1 for i, projected in enumerate(low) if projected] == [4, 8, 12]


def test_a_fit_with_another_trainer_goes_on_from_the_training_weights(tmp_path):
    module, callback, watch = Module(), DeepTwist(4, "svd", FixedRank(2)), Weights()
    quiet_trainer(tmp_path, callback, watch, max_epochs=1).fit(module, loader())
    last = watch.after[EPOCH]
    seen = []

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(weights(pl_module.net))

    quiet_trainer(tmp_path, callback, Start(), max_epochs=1).fit(module, loader())
    assert distance(seen[0], last) == 0


def test_weights_loaded_after_a_fit_are_what_the_next_fit_starts_from(tmp_path):
    module, callback = Module(), DeepTwist(4, "svd", FixedRank(2))
    quiet_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    module.net.load_state_dict(Net().state_dict())
    module.net.conv2.weight.data.mul_(0.5)  # not counted as a write
    seen = []

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(weights(pl_module.net))

    quiet_trainer(tmp_path, callback, Start(), max_epochs=1).fit(module, loader())
    assert torch.equal(seen[0]["conv2.weight"], Net().conv2.weight * 0.5)


# -- weights that cannot be projected -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                with torch.no_grad():
                    pl_module.net.fc1.weight[0, 0] = value
                self.before = weights(pl_module.net)

    poison, module = Poison(), Module()
    loop = quiet_trainer(tmp_path, poison, DeepTwist(3, "svd", FixedRank(2)), max_steps=5)
    with pytest.raises(ValueError, match="fc1"):
        loop.fit(module, loader())
    for name, tensor in weights(module.net).items():
        assert torch.equal(tensor.nan_to_num(7.0), poison.before[name].nan_to_num(7.0))


def test_frozen_targets_are_skipped_and_named(tmp_path, capsys):
    net = Net()
    net.fc1.requires_grad_(False)
    module = Module(net, lambda ps: torch.optim.SGD([p for p in ps if p.requires_grad], lr=0.1))
    callback = DeepTwist(2, "svd", FixedRank(2))
    train(tmp_path, callback, module, max_steps=2)
    assert torch.equal(module.net.fc1.weight, Net().fc1.weight)
    assert "frozen" in callback.plan.dense["net.fc1"]
    assert "frozen" in " ".join(capsys.readouterr().out.split())


def test_the_table_is_printed_once(tmp_path, capsys):
    module, callback = Module(), DeepTwist(2, "svd", FixedRank(2))
    loop = quiet_trainer(tmp_path, callback, max_steps=5)
    loop.fit(module, loader(), loader(1))
    out = capsys.readouterr().out
    assert out.count("Low-rank structures") == 1
    for words in ("net.conv2", "the first convolution", "the last linear layer", "svd"):
        assert words in out


def test_patterns_that_match_nothing(tmp_path):
    for arguments in (
        {"targets": Targets(include=["nothing.*"])},
        {"method": {"nothing.*": "svd"}},
        {"rank": {"nothing.*": FixedRank(2)}},
    ):
        with pytest.raises(ValueError, match=r"nothing\.\*"):
            train(tmp_path, DeepTwist(2, **arguments), max_steps=2)


def test_plain_modules_with_shared_layers(tmp_path):
    """A layer used twice is one target."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.again = self.inner
            self.last = nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.again(torch.tanh(self.inner(x.flatten(1)[:, :16])))))

    callback = DeepTwist(2, "svd", FixedRank(2))
    module = Module(Twice())
    train(tmp_path, callback, module, max_steps=3)
    assert [c.name for c in callback.plan.compressions] == ["net.inner"]
    assert module.net.again is module.net.inner
    assert torch.linalg.matrix_rank(module.net.inner.weight.detach().double(), rtol=1e-5) == 2
