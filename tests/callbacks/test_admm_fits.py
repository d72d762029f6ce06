"""ADMM in fits: against a bare loop, resumed, and on real images."""

import re
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import EPOCH, Module, Net, StepData, distance, images, loader, quiet_trainer, sgd, weights
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lowrank_pl import ADMM, ExtractStructure, LowRankPlusColumns, LStep, Targets, load_compressed, make_plan
from lowrank_pl.decompositions import DENSE
from lowrank_pl.methods import add_split_gradients_, deployed, split_step
from lowrank_pl.models import LeNet300
from lowrank_pl.structures import SomeChannels, Sum
from lowrank_pl.tracing import record

QUICK = {"lambda_1": 0.05, "lambda_2": 0.05, "l_step_epochs": 1}
pytestmark = pytest.mark.filterwarnings("ignore:ADMM has ended", "ignore:No layer was compressed")


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})


def fit(root, callback, *others, module=None, log=None, **arguments):
    module = module or Module()
    loop = quiet_trainer(root, callback, *others, **{"max_epochs": 9, "logger": log or False, **arguments})
    loop.fit(module, loader())
    return module, loop


def bare_loop(steps, growth, balance):
    net = Net()
    plan = make_plan(net, LowRankPlusColumns(), None, None, record(net, images()[0][:2]), training=True)
    optimizer = sgd(net.parameters())
    state, _ = split_step(plan, None, 0.05, 0.05, 0.1)
    for _ in range(steps - 1):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            add_split_gradients_(plan, state)
            optimizer.step()
        state, _ = split_step(plan, state, 0.05, 0.05, 0.1, growth, balance)
    trained = weights(net)
    return trained, state, deployed(plan, state)[1]


@pytest.mark.parametrize(("growth", "balance"), [(1.0, False), (1.5, False), (1.0, True)])
@pytest.mark.parametrize(
    "length", [{"l_step_epochs": 1}, {"l_step_steps": EPOCH}, {"l_step": LStep(epochs=1)}], ids=str
)
def test_it_is_the_bare_loop(tmp_path, growth, balance, length):
    callback, log = ADMM(0.05, 0.05, growth=growth, balance=balance, steps=4, **length), Log()
    module, loop = fit(tmp_path, callback, log=log)
    trained, state, structures = bare_loop(4, growth, balance)
    with callback.training_weights():
        assert distance(weights(module.net), trained) <= 1e-6
    for name, structure in structures.items():
        assert callback.state.sizes()[f"net.{name}"] == state.sizes()[name]
        found = module.net.get_submodule(name).weight.detach()
        torch.testing.assert_close(found, structure.reconstruct(), rtol=1e-4, atol=1e-5)
    assert loop.global_step == 3 * EPOCH
    rows = [row for row in log.rows if "lowrank/t" in row]
    assert [row["step"] for row in rows] == [0, EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert all(0 < row["lowrank/primal"] < 2 and row["lowrank/dual"] > 0 for row in rows[1:])
    for name, (rank, channels) in callback.state.sizes().items():
        assert (rows[-1][f"lowrank/rank/{name}/0"], rows[-1][f"lowrank/rank/{name}/1"]) == (rank, channels)


@pytest.mark.parametrize("balance", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, balance):
    def run(root, ckpt=None):
        callback, log = ADMM(**QUICK, steps=4, growth=1.0 if balance else 1.3, balance=balance), Log()
        every = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = StepData()
        loop = quiet_trainer(
            root, callback, every, max_epochs=9, logger=log, enable_checkpointing=True, num_sanity_val_steps=0
        )
        loop.fit(module, loader(), loader(1), ckpt_path=ckpt, weights_only=True)
        with callback.training_weights():
            trained = weights(module.net)
        return weights(module.net), trained, callback.state, [row for row in log.rows if "lowrank/t" in row]

    end, trained, state, rows = run(tmp_path / "whole")
    for step in range(1, 3 * EPOCH, 2):
        other, other_trained, again, later = run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert distance(end, other) == distance(trained, other_trained) == 0
        for name, layer in state.layers.items():
            for part in ("m", "a", "b", "multipliers"):
                assert torch.equal(getattr(layer, part), getattr(again.layers[name], part))
        assert later == [row for row in rows if row["step"] > step]


def test_a_checkpoint_of_another_problem_is_warned_of(tmp_path):
    _, loop = fit(tmp_path, ADMM(**QUICK, steps=2))
    loop.save_checkpoint(tmp_path / "end.ckpt")
    for lambda_1, said in ((0.05, None), (0.1, "lambda_1=0.05.*goes on.*lambda_1=0.1")):
        other, module = ADMM(**{**QUICK, "lambda_1": lambda_1}, steps=2), Module()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = quiet_trainer(tmp_path, other, max_epochs=9)
            again.fit(module, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
        assert again.global_step == EPOCH  # it was finished
        (*_, text) = ["", *(str(w.message) for w in caught if "goes on with" in str(w.message))]
        assert bool(text) == (said is not None)
        assert re.search(said or "", text)


def test_it_ends_early_when_nothing_moves(tmp_path):
    callback = ADMM(1e-5, 1e-5, t0=1.0, l_step_epochs=1, steps=50, tolerance=1e6, patience=2)
    _, loop = fit(tmp_path, callback, max_epochs=30)
    assert callback.finished
    assert callback.state.steps < 50
    assert loop.global_step == (callback.state.steps - 1) * EPOCH


def test_lambdas_that_do_nothing_are_told_of(tmp_path):
    callback = ADMM(1e-5, 1e-5, l_step_epochs=1, steps=2)
    with pytest.warns(UserWarning, match=rf"every layer dense.*lambda_1=1e-05.*\({EPOCH} here\)"):
        fit(tmp_path, callback)
    callback = ADMM(3.0, 3.0, l_step_epochs=1, steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, callback)
    assert not any("every layer dense" in str(w.message) for w in caught)


def test_a_shorter_fit_ends_with_the_structure_too(tmp_path):
    callback = ADMM(**QUICK, steps=9)
    extract = ExtractStructure(latency=False)
    with pytest.warns(UserWarning, match="Training ended after 2 of 9 proximal steps"):
        fit(tmp_path, callback, extract, max_epochs=1)
    assert callback.distortion.choices.keys() == {"net.conv2", "net.fc1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_1": 0.0}, "lambda_1"),
        ({"lambda_2": float("nan")}, "lambda_2"),
        ({"t0": -1.0}, "t0"),
        ({"growth": 0.9}, "growth"),
        ({"growth": 1.5, "balance": True}, "growth"),
        ({"steps": 0}, "steps"),
        ({"patience": 0.5}, "patience"),
        ({"tolerance": -1}, "tolerance"),
        ({"l_step_steps": 3}, "exactly one"),
        ({"l_step": LStep(epochs=1)}, "several"),
        ({"l_step_epochs": None, "l_step": LStep(epochs=1, penalty="quadratic")}, "penalty"),
        ({"l_step_epochs": None}, "exactly one"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ADMM(**{**QUICK, **arguments})


def test_digits_end_with_fewer_channels(tmp_path):
    """LeNet300, 15 epochs and 15 more: within four points of the dense network at a quarter of the weights;
    what has been saved runs."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16 - 0.3, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
    test = x[1400:], y[1400:]
    torch.manual_seed(0)
    net = LeNet300((1, 8, 8), 10)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True)
    for _ in range(15):
        for i in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()

    def accuracy(network):
        with torch.no_grad():
            return float((network(test[0]).argmax(1) == test[1]).float().mean())

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, nesterov=True)

    before = accuracy(net)
    callback = ADMM(0.01, 0.015, steps=16, l_step_epochs=1, targets=Targets(skip_first=False))
    extract = ExtractStructure(tmp_path / "small", submodule="net", latency=False)
    loop = quiet_trainer(tmp_path, callback, extract, max_epochs=-1)
    loop.fit(
        Plain(),
        DataLoader(TensorDataset(x[:1400], y[:1400]), 64, shuffle=True, generator=torch.Generator().manual_seed(0)),
    )
    small = load_compressed(LeNet300((1, 8, 8), 10), tmp_path / "small")
    assert accuracy(small) == pytest.approx(accuracy(extract.extracted))
    assert accuracy(small) > before - 0.04
    assert accuracy(net) == pytest.approx(accuracy(small), abs=2 / 397)
    assert sum(p.numel() for p in small.parameters()) < 50_000 / 4
    for name, columns in (("fc1", 64), ("fc2", 300)):
        choice = callback.distortion.choices[f"net.{name}"]
        assert choice != DENSE
        rank, channels = choice.rank
        assert channels < columns / 2
        layout = small.get_submodule(name).layout
        assert isinstance(layout, Sum if channels else object)
        if channels:
            assert isinstance(layout.parts[0], SomeChannels)
            own = small.get_submodule(f"{name}.branches.0").channels
            assert len(own.unique()) == channels
        assert rank < 20
