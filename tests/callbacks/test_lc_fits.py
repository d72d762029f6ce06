"""The callback against Algorithm 1 in a bare loop, its length, its schedule, and what it leaves behind."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import (
    EPOCH,
    SIZE,
    Module,
    Net,
    StepData,
    TwoOptimizers,
    distance,
    images,
    loader,
    quiet_trainer,
    sgd,
    weights,
)
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, StepLR

from lowrank_pl import SVD, CostBudget, ExtractStructure, Latency, LearningCompression, Targets
from lowrank_pl.decompositions import DENSE, ZERO, Choice
from lowrank_pl.layers import ConstantLayer

TARGETS = ("conv2", "fc1")
FIRST_TOO = Targets(skip_first=False)
SHAPES = {"conv2": (12, 72), "fc1": (16, 48)}
POSITIONS = {"conv2": 16, "fc1": 1}
QUICK = {"mu0": 0.05, "growth": 1.5, "l_step_epochs": 1}


class Log(pl.loggers.logger.DummyLogger):
    """What is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})


class States(pl.Callback):
    """Weights and the callback's state after every batch; belongs behind the callback."""

    def __init__(self, callback):
        self.callback, self.seen = callback, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = self.callback.state
        self.seen[trainer.global_step] = (
            weights(pl_module.net),
            state.choices,
            {k: v.clone() for k, v in state.anchors.items()},
        )


def best_rank(s, rows, columns, price, mu):
    """The rank r that minimizes `price cost(r) + mu/2 ||A - A_r||^2`, of singular values s of a matrix A; the smallest
    one where several do. The full rank is the dense matrix."""
    best = None
    for r in range(rows + 1):
        cost = rows * columns if r == rows else r * (rows + columns)
        if r not in (0, rows) and cost >= rows * columns:
            continue
        value = price * cost + mu / 2 * float(s[r:].square().sum())
        if best is None or value < best[0]:
            best = (value, r)
    return best[1]


def bare_loop(net, lambda_, l_step, steps, mu0, growth, normalize=True, augmented=True, clip=None, optimizer=sgd):
    """Algorithm 1 with dense Theta and explicit beta, its C step by NumPy-like SVD over all ranks; the weights after
    every step."""
    net = copy.deepcopy(net).train()
    x, y = images()
    optimizer, after = optimizer(net.parameters()), {}
    layers = {name: net.get_submodule(name).weight for name in TARGETS}
    scale = {name: float(w.detach().double().square().sum()) if normalize else 1.0 for name, w in layers.items()}
    beta = {name: torch.zeros_like(w).double() for name, w in layers.items()}
    theta, ranks = {}, {}

    def c_step(mu):
        for name, w in layers.items():
            rows, columns = SHAPES[name]
            shifted = w.detach().double() - beta[name] / mu
            u, s, v = torch.linalg.svd(shifted.reshape(rows, columns), full_matrices=False)
            r = ranks[name] = best_rank(s, rows, columns, lambda_ / 1e6 * scale[name] * POSITIONS[name], mu)
            theta[name] = ((u[:, :r] * s[:r]) @ v[:r]).reshape(w.shape)
            if augmented:
                beta[name] = beta[name] - mu * (w.detach().double() - theta[name])

    c_step(mu0)
    for j in range(1, steps):
        mu = mu0 * growth**j
        for _ in range(l_step):
            step = len(after)
            i = step % EPOCH * SIZE
            F.cross_entropy(net(x[i : i + SIZE]), y[i : i + SIZE]).backward()
            for name, w in layers.items():
                w.grad.add_((mu * (w.detach().double() - theta[name]) - beta[name]).float())
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            after[step + 1] = weights(net)
        c_step(mu)
    return after, ranks, theta


def svd_of(rank, shape):
    """What is chosen at this rank of the lowered matrix, the full one standing for dense."""
    return ZERO if rank == 0 else DENSE if rank == min(shape) else Choice(SVD(), (rank,))


def fit(root, callback, *others, module=None, log=None, **arguments):
    module = module or Module()
    arguments = {"max_epochs": 100} | arguments
    loop = quiet_trainer(root, callback, *others, logger=log or False, **arguments)
    loop.fit(module, loader(), ckpt_path=arguments.get("ckpt_path"))
    return module, loop


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("penalty", ["augmented", "quadratic"])
@pytest.mark.parametrize("length", [{"l_step_epochs": 1}, {"l_step_steps": 4}])
def test_the_trajectory_is_that_of_algorithm_1(tmp_path, normalize, penalty, length):
    lambda_ = 30.0 if normalize else 60.0
    callback = LearningCompression(
        lambda_, steps=5, mu0=0.05, growth=1.5, normalize=normalize, penalty=penalty, **length
    )
    watch = States(callback)
    module, loop = fit(tmp_path, callback, watch)
    l_step = length.get("l_step_steps", EPOCH)
    after, ranks, theta = bare_loop(Net(), lambda_, l_step, 5, 0.05, 1.5, normalize, penalty == "augmented")
    assert loop.global_step == 4 * l_step == len(after)
    assert callback.state.choices == {f"net.{n}": svd_of(r, SHAPES[n]) for n, r in ranks.items()}
    for step, expected in after.items():
        assert distance(watch.seen[step][0], expected) < 1e-5
    for name in TARGETS:  # at the end the module holds Theta
        torch.testing.assert_close(module.net.get_submodule(name).weight.double(), theta[name], atol=1e-5, rtol=1e-4)
    assert 0 < sum(ranks.values()) < 28


def test_it_stops_the_trainer_and_logs(tmp_path):
    log = Log()
    callback = LearningCompression(30.0, steps=4, **QUICK)
    _, loop = fit(tmp_path, callback, log=log)
    assert loop.current_epoch == 3
    rows = [row for row in log.rows if "lowrank/mu" in row]
    assert [row["step"] for row in rows] == [0, 6, 12, 18]
    assert [row["lowrank/mu"] for row in rows] == pytest.approx([0.05, 0.075, 0.1125, 0.16875])
    for row in rows:
        assert row["lowrank/lagrangian_after"] <= row["lowrank/lagrangian_before"]
        assert {"lowrank/gap", "lowrank/penalty", "lowrank/cost", "lowrank/lambda"} < set(row)
    assert rows[-1]["lowrank/rank/net.fc1"] == callback.state.choices["net.fc1"].rank[0]


def test_the_first_act_is_a_c_step_before_the_first_optimizer_step(tmp_path):
    callback = LearningCompression(30.0, steps=2, **QUICK)
    seen = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.setdefault(trainer.global_step, (callback.state.steps, weights(pl_module.net)))

    fit(tmp_path, callback, Look())
    assert seen[0][0] == 1
    assert distance(seen[0][1], weights(Net())) == 0


@pytest.mark.parametrize("stop", [{"max_epochs": 1}, {"max_steps": 9}])
def test_a_shorter_fit_warns_and_ends_on_a_c_step(tmp_path, stop):
    callback = LearningCompression(30.0, steps=9, **QUICK)
    with pytest.warns(UserWarning, match="of 9 C steps"):
        module, loop = fit(tmp_path, callback, **stop)
    state = callback.state
    loop.save_checkpoint(tmp_path / "after.ckpt")
    stored = torch.load(tmp_path / "after.ckpt", weights_only=True)
    lc = next(v for k, v in stored["callbacks"].items() if "LearningCompression" in k)["lc"]
    assert lc["steps"] == state.steps  # the closing C step is in memory only
    assert not torch.equal(stored["state_dict"]["net.fc1.weight"], module.net.fc1.weight)
    for name in TARGETS:
        structure = callback.distortion.structures[f"net.{name}"]
        torch.testing.assert_close(module.net.get_submodule(name).weight.detach(), structure.reconstruct())


def test_it_ends_early_when_nothing_moves(tmp_path):
    callback = LearningCompression(30.0, steps=50, mu0=50.0, growth=2.0, l_step_steps=2, patience=3, tolerance=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, callback, module=Module(optimizer=lambda p: torch.optim.SGD(p, lr=1e-5)))
    assert callback.finished
    assert 4 <= callback.state.steps < 50
    assert callback.state.unchanged >= 3


def test_validation_sees_theta_and_training_goes_on_from_the_weights(tmp_path):
    callback = LearningCompression(30.0, steps=3, **QUICK)
    watch, module = States(callback), Module()
    loop = quiet_trainer(tmp_path, callback, watch, max_epochs=9, num_sanity_val_steps=0, val_check_interval=3)
    loop.fit(module, loader(), loader(1))
    plain, _ = fit(tmp_path, again := LearningCompression(30.0, steps=3, **QUICK), other := States(again))
    for step, (state, *_) in other.seen.items():
        assert distance(state, watch.seen[step][0]) == 0
    assert distance(weights(plain.net), weights(module.net)) == 0
    theta = {f"{n}.weight": callback.state.structures[f"net.{n}"].reconstruct() for n in TARGETS}
    assert all(torch.equal(module.seen[-1][name], theta[name]) for name in theta)  # the last epoch's end


@pytest.mark.parametrize("validate", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, validate):
    """From every step, an epoch's last batch and the one after the end included."""

    def run(root, ckpt=None):
        callback, log = LearningCompression(30.0, steps=4, mu0=0.05, growth=1.5, l_step_epochs=1), Log()
        watch, module = States(callback), StepData()
        every = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        loop = quiet_trainer(
            root, callback, watch, every, max_epochs=9, logger=log, enable_checkpointing=True, num_sanity_val_steps=0
        )
        loop.fit(module, loader(), loader(1) if validate else None, ckpt_path=ckpt, weights_only=True)
        return watch.seen, weights(module.net), callback, [row for row in log.rows if "lowrank/mu" in row]

    seen, end, callback, rows = run(tmp_path / "whole")
    for step in range(1, 3 * EPOCH):
        again, again_end, other, later = run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert distance(end, again_end) == 0
        assert other.state.choices == callback.state.choices
        assert other.state.mu == callback.state.mu
        for k, (state, chosen, anchors) in again.items():
            assert distance(state, seen[k][0]) == 0
            assert chosen == seen[k][1]
            assert distance(anchors, seen[k][2]) == 0
        assert later == [row for row in rows if row["step"] > step]


def test_a_finished_run_stays_finished(tmp_path):
    callback = LearningCompression(30.0, steps=2, **QUICK)
    module, loop = fit(tmp_path, callback)
    loop.save_checkpoint(tmp_path / "end.ckpt")
    again = LearningCompression(30.0, steps=2, **QUICK)
    other = Module()
    loop = quiet_trainer(tmp_path, again, max_epochs=9)
    loop.fit(other, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert loop.global_step == EPOCH
    assert distance(weights(other.net), weights(module.net)) == 0


def test_a_checkpoint_of_another_problem_is_warned_of(tmp_path):
    _, loop = fit(tmp_path, LearningCompression(30.0, steps=2, **QUICK))
    loop.save_checkpoint(tmp_path / "end.ckpt")
    for other, said in (
        (LearningCompression(30.0, steps=2, **QUICK), None),
        (LearningCompression(60.0, steps=2, **QUICK), "lambda_=30.*goes on with.*lambda_=60"),
        (LearningCompression(30.0, steps=2, normalize=False, **QUICK), "normalize=True.*goes on with.*normalize=False"),
        (
            LearningCompression(budget=CostBudget("macs", 0.5), steps=2, **QUICK),
            "CostPenalty.*goes on with.*CostBudget",
        ),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = quiet_trainer(tmp_path, other, max_epochs=9)
            again.fit(Module(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
        (*_, text) = ["", *(str(w.message) for w in caught if "goes on with" in str(w.message))]
        assert bool(text) == (said is not None)
        assert re.search(said or "", text)


def test_a_test_from_a_checkpoint_sees_theta(tmp_path):
    callback = LearningCompression(30.0, steps=3, **QUICK)
    module, loop = fit(tmp_path, callback)
    loop.save_checkpoint(tmp_path / "end.ckpt")
    fresh = Module()
    tester = quiet_trainer(tmp_path, LearningCompression(30.0, steps=3, **QUICK))
    tester.test(fresh, loader(1), ckpt_path=tmp_path / "end.ckpt", weights_only=True, verbose=False)
    for name in TARGETS:
        assert torch.equal(fresh.seen[0][f"{name}.weight"], module.net.get_submodule(name).weight)


@pytest.mark.parametrize(
    "arguments",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["accumulation", "clipping", "bf16"],
)
def test_ways_of_training(tmp_path, arguments):
    callback = LearningCompression(30.0, steps=4, **QUICK)
    watch = States(callback)
    _, loop = fit(tmp_path, callback, watch, **arguments)
    assert callback.state.steps == 4
    assert loop.global_step == 3 * EPOCH / arguments.get("accumulate_grad_batches", 1)
    if "gradient_clip_val" in arguments:  # which acts on the sum of gradient and penalty
        after, *_ = bare_loop(Net(), 30.0, EPOCH, 4, 0.05, 1.5, clip=0.1)
        assert all(distance(watch.seen[step][0], state) < 1e-5 for step, state in after.items())


def test_two_optimizers_each_with_its_own_penalty(tmp_path):
    callback = LearningCompression(30.0, steps=3, mu0=0.05, growth=1.5, l_step_epochs=1)
    added = []

    class Count(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if callback.state is not None:
                added.append([p.grad is not None for p in (pl_module.net.conv2.weight, pl_module.net.fc1.weight)])

    module, _ = fit(tmp_path, callback, Count(), module=TwoOptimizers())
    assert callback.state.steps == 3
    assert added
    for name in TARGETS:
        theta = callback.state.structures[f"net.{name}"].reconstruct()
        assert torch.equal(module.net.get_submodule(name).weight, theta)


def test_a_budget(tmp_path):
    callback = LearningCompression(budget=CostBudget("macs", 0.6), steps=3, **QUICK)
    extract = ExtractStructure(submodule="net")
    fit(tmp_path, callback, extract)
    assert extract.report.compressed.macs <= 0.6 * extract.report.dense.macs
    assert extract.report.compressed.macs > 0.45 * extract.report.dense.macs


def test_rank_0_before_batch_norm_is_reported_and_free(tmp_path):
    log = Log()
    callback = LearningCompression(1e5, steps=2, mu0=1e-6, growth=1.1, l_step_epochs=1, targets=FIRST_TOO)
    with pytest.warns(UserWarning, match="Every layer has rank 0"):
        fit(tmp_path, callback, module=Module(Net(norm=True)), log=log)
    assert callback.state.free == ("net.conv1",)
    assert [row["lowrank/unpenalized"] for row in log.rows if "lowrank/mu" in row] == [1, 1]


def test_rank_0_is_extracted_as_a_constant(tmp_path):
    callback = LearningCompression(1e5, steps=2, mu0=1e-6, growth=1.1, l_step_epochs=1)
    extract = ExtractStructure(submodule="net")
    with pytest.warns(UserWarning, match=r"Every layer has rank 0 at mu0 = 1e-06.*mu0 above .* at least one"):
        fit(tmp_path, callback, extract)
    assert isinstance(extract.extracted.fc1, ConstantLayer)
    assert isinstance(extract.extracted.conv2, ConstantLayer)
    assert extract.extracted(images(1)[0]).shape == (SIZE, 4)


def test_zeros_beside_layers_that_stay_dense_are_warned_of(tmp_path):
    def cost(layer):  # the convolution costs nothing, and stays as it is
        return layer.macs if layer.kind == "linear" else 0

    callback = LearningCompression(1e5, cost=cost, steps=2, mu0=1e-6, growth=1.1, l_step_epochs=1)
    with pytest.warns(UserWarning, match="Every layer that does not stay dense has rank 0 at mu0 = 1e-06"):
        fit(tmp_path, callback)
    assert callback.state.choices["net.fc1"] == ZERO
    assert callback.state.choices["net.conv2"] != ZERO


def test_networks_that_stay_dense_are_warned_of_at_the_first_and_the_last_c_step(tmp_path):
    callback = LearningCompression(1e-9, steps=3, mu0=0.1, growth=2.0, l_step_epochs=1)
    with pytest.warns(UserWarning, match="Every layer is dense") as caught:
        fit(tmp_path, callback)
    first, last = (str(w.message) for w in caught if "Every layer is dense" in str(w.message))
    pattern = (
        r"at mu = (\S+): lambda_ = 1e-09 is worth no rank. With lambda_ above (\S+?)(, above (\S+) at mu0 = 0.1,)? at"
    )
    (begin, least, more, _), (end, at_last, _, at_first) = (re.search(pattern, t).groups() for t in (first, last))
    assert (begin, end, more) == ("0.1", "0.4", None)
    assert float(at_last) == pytest.approx(4 * float(at_first), rel=0.1)
    for factor, expected in ((0.9, True), (1.1, False)):
        warned = LearningCompression(factor * float(least), steps=1, mu0=0.1, growth=2.0, l_step_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, warned)
        assert any("Every layer is dense" in str(w.message) for w in caught) == expected


@pytest.mark.parametrize(
    ("arguments", "normed", "unit"),
    [
        ({"lambda_": 2.0}, True, "multiply-adds"),
        ({"lambda_": 2.0, "cost": "params"}, True, "weights"),
        ({"lambda_": 2.0, "normalize": False}, False, "multiply-adds"),
        ({"budget": CostBudget("macs", 0.6)}, True, "multiply-adds"),
    ],
)
def test_what_lambda_amounts_to_is_printed(tmp_path, capsys, arguments, normed, unit):
    module = Module()
    norms = [float(getattr(module.net, name).weight.detach().square().sum()) for name in TARGETS]
    log = Log()
    callback = LearningCompression(**arguments, steps=2, mu0=0.1, growth=2.0, l_step_epochs=1)
    fit(tmp_path, callback, module=module, log=log)
    lines = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("lambda ="))
    lambda_ = log.rows[0]["lowrank/lambda"]
    sizes = [864 * (16 if arguments.get("cost") != "params" else 1), 768]
    dense = sum(lambda_ / 1e6 * (n if normed else 1) * size for n, size in zip(norms, sizes, strict=True))
    low, high = min(norms), max(norms)
    scaled = f" x ||W||^2 ({low:.3g} to {high:.3g}) = {lambda_ * low:.3g} to {lambda_ * high:.3g}" if normed else ""
    assert lines[at] == f"lambda = {lambda_:.3g}{scaled} in loss per million {unit}."
    assert lines[at + 1] == f"These layers, dense, cost {dense:.3g} in loss."


def test_momentum_is_cleared_and_large_steps_are_warned_of(tmp_path):
    callback = LearningCompression(30.0, steps=3, mu0=10.0, growth=2.0, l_step_epochs=1, clear_momentum=True)
    counts = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(len(trainer.optimizers[0].state))

    with pytest.warns(UserWarning, match=r"learning rate times mu = 20 is 1\.05"):
        fit(tmp_path, callback, Look())
    assert counts[EPOCH - 1] == 0
    assert counts[0] > 0


SCHEDULES = {
    "lambda": lambda o: LambdaLR(o, lambda n: 1 / (1 + n)),
    "step": lambda o: StepLR(o, 2, 0.5),
    "exponential": lambda o: ExponentialLR(o, 0.8),
    "cosine": lambda o: CosineAnnealingLR(o, 50),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_learning_rates_start_anew(tmp_path, schedule, interval, decay):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = SCHEDULES[schedule](optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    used = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

    callback = LearningCompression(
        30.0, steps=4, mu0=0.05, growth=1.5, l_step_epochs=2, restart_lr=True, lr_decay=decay
    )
    fit(tmp_path, callback, Look(), module=Scheduled())
    expected = []
    for j in range(3):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1 * decay**j)
        scheduler = SCHEDULES[schedule](optimizer)
        for step in range(2 * EPOCH):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if interval == "step" or (step + 1) % EPOCH == 0:
                scheduler.step()
    assert used == pytest.approx(expected)


def test_a_decay_without_a_restart(tmp_path):
    used = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

    fit(tmp_path, LearningCompression(30.0, steps=4, lr_decay=0.5, **QUICK), Look())
    assert used == pytest.approx([0.2 * 0.5**j for j in range(3) for _ in range(EPOCH)])


BAD = [
    ({}, ValueError, "exactly one of the arguments `lambda_` and `budget`"),
    ({"lambda_": 1.0, "budget": CostBudget("macs", 0.5)}, ValueError, "`lambda_` and `budget`"),
    ({"lambda_": -1.0}, ValueError, "`lambda_`"),
    ({"lambda_": 1.0, "l_step_steps": 3}, ValueError, "`l_step_epochs` and `l_step_steps`"),
    ({"lambda_": 1.0, "l_step_epochs": None}, ValueError, "`l_step_epochs` and `l_step_steps`"),
    ({"lambda_": 1.0, "l_step_epochs": 0}, ValueError, "`l_step_epochs`"),
    ({"budget": 0.5}, TypeError, "`budget`"),
    ({"lambda_": 1.0, "growth": 1.0}, ValueError, "`growth`"),
    ({"lambda_": 1.0, "mu0": 0.0}, ValueError, "`mu0`"),
    ({"lambda_": 1.0, "steps": 0}, ValueError, "`steps`"),
    ({"lambda_": 1.0, "penalty": "cubic"}, ValueError, "`penalty`"),
    ({"lambda_": 1.0, "cost": "mac"}, ValueError, "`cost`.*latency, macs, params"),
    ({"lambda_": 1.0, "method": "sdv"}, ValueError, "sdv"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningCompression(**({"l_step_epochs": 1} | arguments))


def frozen():
    module = Module()
    module.net.fc1.weight.requires_grad_(False)
    return module


CACHE = str(Path(__file__).parent / "latency_of_another_machine.json")


def falling(layer):
    return 1e6 - layer.num_weights


@pytest.mark.parametrize(
    ("arguments", "module", "message"),
    [
        ({}, frozen, r"'net\.fc1' is frozen"),
        ({}, lambda: Module(optimizer=lambda p: sgd(list(p)[:2])), r"'net\.conv2'.*no optimizer has it"),
        ({}, lambda: Module(optimizer=lambda p: torch.optim.LBFGS(p)), "LBFGS"),
        ({"cost": falling}, Module, "does not fall with the rank"),
        ({"lambda_": None, "budget": CostBudget("macs", 1e-3)}, Module, "cannot be reached"),
        ({"targets": Targets(include=["nothing"])}, Module, "nothing"),
        ({"cost": Latency(cache=CACHE)}, Module, "measured for .*another machine.*but this is"),
    ],
)
def test_what_is_refused_before_the_first_step(tmp_path, arguments, module, message):
    callback, module = LearningCompression(**({"lambda_": 30.0, "steps": 3, **QUICK} | arguments)), module()
    before = weights(module.net)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, callback, module=module)
    assert distance(before, weights(module.net)) == 0


def test_weights_that_are_not_finite(tmp_path):
    class Explode(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2 * EPOCH - 1:
                pl_module.net.fc1.weight.data[0, 0] = float("inf")

    callback = LearningCompression(30.0, steps=9, **QUICK)
    with pytest.raises(ValueError, match=r"Layer 'net\.(conv2|fc1)': expected finite"):
        fit(tmp_path, Explode(), callback, module=Module(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    assert callback.state.steps == 2
