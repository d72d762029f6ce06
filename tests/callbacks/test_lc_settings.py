"""The L step and the schedule of mu, as an `LStep` and a `MuSchedule` or as their fields among the arguments."""

import warnings

import pytest
from nets import EPOCH, Module, StepData, distance, loader, quiet_trainer, weights

from lowrank_pl import CostBudget, Latency, LearningCompression
from lowrank_pl.callbacks.lc_settings import LStep, MuSchedule

FIELDS = [
    ({"l_step_epochs": 2}, {"epochs": 2}),
    ({"l_step_steps": 7}, {"steps": 7}),
    ({"l_step_epochs": None, "l_step_steps": 7}, {"steps": 7}),  # as configuration files say it
    ({"l_step_epochs": 1, "l_step_steps": None}, {"epochs": 1}),
    ({"l_step_epochs": 1, "penalty": "quadratic"}, {"epochs": 1, "penalty": "quadratic"}),
    ({"l_step_epochs": 1, "penalty": "augmented"}, {"epochs": 1}),
    ({"l_step_epochs": 1, "lr_decay": 0.9}, {"epochs": 1, "lr_decay": 0.9}),
    ({"l_step_epochs": 1, "restart_lr": True}, {"epochs": 1, "restart_lr": True}),
    ({"l_step_steps": 1, "clear_momentum": True}, {"steps": 1, "clear_momentum": True}),
    (
        {"l_step_steps": 3, "penalty": "quadratic", "lr_decay": 2, "restart_lr": True, "clear_momentum": True},
        {"steps": 3, "penalty": "quadratic", "lr_decay": 2, "restart_lr": True, "clear_momentum": True},
    ),
]


@pytest.mark.parametrize(("names", "fields"), FIELDS)
def test_both_ways_say_the_same(names, fields):
    by_name, by_object = LearningCompression(1.0, **names), LearningCompression(1.0, l_step=LStep(**fields))
    assert by_name.l_step == by_object.l_step == LStep(**fields)
    assert by_name.length == by_object.length
    assert all(getattr(by_name.l_step, field) == value for field, value in fields.items())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mu0": 0.3},
        {"growth": 2},
        {"steps": 7, "patience": 2},
        {"mu0": 1, "growth": 1.1, "steps": 3, "patience": 9, "tolerance": 0},
    ],
)
def test_both_ways_schedule_the_same(fields):
    by_name = LearningCompression(1.0, l_step_epochs=2, **fields)
    by_object = LearningCompression(1.0, l_step_epochs=2, schedule=MuSchedule(**fields))
    assert by_name.schedule == by_object.schedule == MuSchedule(**fields)
    assert by_name.length == {"max_epochs": 2 * (fields.get("steps", 40) - 1)}
    mu, growth = fields.get("mu0", 1e-3), fields.get("growth", 1.2)
    for j in range(5):
        assert by_name.schedule.mu(j) == pytest.approx(mu, rel=1e-12)
        mu *= growth


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mu0": 0}, "`mu0`.*above 0.*0"),
        ({"mu0": float("nan")}, "`mu0`.*nan"),
        ({"growth": 1}, "`growth`.*above 1.*1"),
        ({"steps": 0}, "`steps`.*at least 1.*0"),
        ({"steps": 2.5}, "`steps`.*2.5"),
        ({"patience": 0}, "`patience`.*at least 1.*0"),
        ({"tolerance": -1}, "`tolerance`.*at least 0.*-1"),
        ({"tolerance": "abc"}, "`tolerance`.*'abc'"),
    ],
)
def test_what_is_no_schedule(fields, message):
    with pytest.raises(ValueError, match=message):
        MuSchedule(**fields)
    with pytest.raises(ValueError, match=message):
        LearningCompression(1.0, l_step_epochs=1, **fields)


def test_both_ways_train_the_same(tmp_path):
    ends = []
    for arguments in (
        {"l_step": LStep(epochs=2, penalty="quadratic", lr_decay=0.5)},
        {"l_step_epochs": 2, "penalty": "quadratic", "lr_decay": 0.5},
        {"l_step_epochs": 2},
    ):
        callback, module = LearningCompression(30.0, steps=3, mu0=0.05, growth=1.5, **arguments), Module()
        loop = quiet_trainer(tmp_path, callback, **callback.length)
        loop.fit(module, loader())
        assert loop.global_step == 2 * 2 * EPOCH
        ends.append(weights(module.net))
    assert distance(ends[0], ends[1]) == 0
    assert distance(ends[0], ends[2]) > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"l_step": LStep(epochs=2), "l_step_epochs": 2}, ValueError, r"`l_step`.*\['l_step_epochs'\].*both"),
        ({"l_step": LStep(epochs=2), "penalty": "quadratic"}, ValueError, r"`l_step`.*\['penalty'\].*both"),
        ({"l_step": 2}, TypeError, r"`l_step`.*LStep\(epochs=2\).*got 2"),
        ({"l_step": {"epochs": 2}}, TypeError, r"`l_step`.*LStep\(epochs=2\)"),
        ({"l_step_epochs": 2, "schedule": MuSchedule(), "mu0": 1}, ValueError, r"`schedule`.*\['mu0'\].*both"),
        ({"l_step_epochs": 2, "schedule": 1e-3}, TypeError, r"`schedule`.*MuSchedule such as.*got 0.001"),
        ({"l_step_epoch": 2}, TypeError, "unexpected keyword argument 'l_step_epoch'"),
        ({"l_step_epochs": 2, "momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
        ({"epochs": 2}, TypeError, "unexpected keyword argument 'epochs'"),
        ({}, ValueError, "`l_step_epochs` and `l_step_steps`"),
        ({"penalty": "quadratic"}, ValueError, "`l_step_epochs` and `l_step_steps`"),
        ({"l_step_epochs": 2, "l_step_steps": 2}, ValueError, "`l_step_epochs` and `l_step_steps`"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LearningCompression(1.0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"epochs": 1, "steps": 1}, "exactly one"),
        ({"epochs": 0}, "l_step_epochs.*at least 1 but got 0"),
        ({"epochs": True}, "l_step_epochs.*True"),
        ({"steps": -1}, "l_step_steps.*-1"),
        ({"steps": 2.0}, "l_step_steps.*2.0"),
        ({"epochs": 1, "penalty": "cubic"}, "`penalty`.*'augmented' or 'quadratic'.*'cubic'"),
        ({"epochs": 1, "lr_decay": 0}, "`lr_decay`.*above 0.*0"),
        ({"epochs": 1, "lr_decay": float("nan")}, "`lr_decay`.*nan"),
        ({"epochs": 1, "lr_decay": float("inf")}, "`lr_decay`.*inf"),
    ],
)
def test_what_is_no_l_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        LStep(**arguments)


def test_batches_that_are_skipped_before_the_first_that_runs(tmp_path):
    """`training_step` may return None: there is nothing to plan yet, and no C step."""

    class Skipping(StepData):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 1) else super().training_step(batch, batch_idx)

    callback, module = LearningCompression(30.0, steps=3, mu0=0.05, growth=1.5, l_step_steps=3), Skipping()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(tmp_path, callback, max_epochs=9).fit(module, loader())
    assert callback.finished
    assert set(callback.state.choices) == {"net.conv2", "net.fc1"}
    for name in ("conv2", "fc1"):
        theta = callback.state.structures[f"net.{name}"].reconstruct()
        assert distance({"": module.net.get_submodule(name).weight.detach()}, {"": theta}) == 0


def test_a_budget_has_its_own_cost():
    budget = CostBudget("params", 0.5)
    with pytest.raises(ValueError, match="`cost` beside `lambda_` only: a budget has its own, Params"):
        LearningCompression(budget=budget, cost=Latency(), l_step_epochs=1)
    assert LearningCompression(budget=budget, cost="params", l_step_epochs=1).rule is budget
