"""DeepTwist asks a rule once: at the start where it looks at shapes alone, else at the first distortion."""

import re
from dataclasses import dataclass, field
from typing import final

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nets import EPOCH, StepData, Weights, distance, loader, quiet_trainer, svd, weights
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn

from lowrank_pl import (
    EVBMF,
    CompressionRatio,
    CostBudget,
    DeepTwist,
    EnergyThreshold,
    ExtractStructure,
    FixedRank,
    MultipleOf,
    RankFraction,
    make_plan,
)
from lowrank_pl.ranks import RankRule

LAYERS = ("fc1", "fc2")
STEPS = 32  # with S_D = 2: 16 distortions
RULES = [EnergyThreshold(0.7), EVBMF(), CostBudget("params", 0.15)]
SHAPES_ALONE = [FixedRank(3), RankFraction(0.2), CompressionRatio(2.0), MultipleOf(CompressionRatio(2.0), 2)]


class Small(nn.Module):
    """LeNet300 made small: `fc1` and `fc2` are the default targets. Spectra fall, down to some noise."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1, self.fc2, self.fc3 = nn.Linear(192, 30), nn.Linear(30, 20), nn.Linear(20, 4)
            for layer in (self.fc1, self.fc2):
                full = min(layer.weight.shape)
                u, _, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
                falling = (u * (2.0 * 0.7 ** torch.arange(full))) @ v
                layer.weight.data = falling + 0.01 * torch.randn(falling.shape)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x.flatten(1))))))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.005)


def small():
    return StepData(Small(), adam)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Counted(RankRule):
    """Another rule, which notes what it answers."""

    rule: RankRule
    answers: list = field(default_factory=list)

    def __repr__(self):
        return repr(self.rule)  # by which a checkpoint knows what chose its ranks

    @property
    def compares(self):
        return self.rule.compares

    @property
    def sees_shapes_alone(self):
        return self.rule.sees_shapes_alone

    def __call__(self, problems, error_weight=1.0, others=()):
        choices = self.rule(problems, error_weight, others)
        self.answers.append({p.name: c for p, c in zip(problems, choices, strict=True)})
        return choices


class Memory(DummyLogger):
    """Every row of ranks that is logged, with its step."""

    def __init__(self):
        super().__init__()
        self.ranks = []

    def log_metrics(self, metrics, step=None):
        kept = {name: value for name, value in metrics.items() if name.startswith("lowrank/rank/")}
        self.ranks += [(step, kept)] if kept else []


class Choices(pl.Callback):
    """After every step what is chosen, and whether that step distorted; belongs behind the callback."""

    def __init__(self, callback):
        self.callback, self.chosen, self.distorted = callback, {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.chosen[step] = None if self.callback.choices is None else dict(self.callback.choices)
        if self.callback.is_projected():
            self.distorted.append(step)


@dataclass
class Run:
    """One fit, with the weights before and after what the callback did at each step."""

    callback: DeepTwist
    module: StepData
    before: dict
    after: dict
    chosen: dict
    distorted: list
    logged: list
    extract: ExtractStructure


def fit(root, rule, S_D=2, steps=STEPS, ckpt_path=None, module=None, validate=False, save=False, **arguments):
    callback, module, log = DeepTwist(S_D, "svd", rule, **arguments), module or small(), Memory()
    before, after, extract = Weights(), Weights(), ExtractStructure(submodule="net")
    choices = Choices(callback)
    every = [ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if save else []
    loop = quiet_trainer(
        root, before, callback, after, choices, extract, *every, max_steps=steps, logger=log, enable_checkpointing=save
    )
    loop.fit(module, loader(), loader(1) if validate else None, ckpt_path=ckpt_path, weights_only=True)
    return Run(callback, module, before.after, after.after, choices.chosen, choices.distorted, log.ranks, extract)


def asked(rule, state):
    """What a rule answers to a network with these weights, asked from outside."""
    net = Small()
    net.load_state_dict(state)
    return {f"net.{name}": choice for name, choice in make_plan(net, "svd", rule).choose_ranks().items()}


def by_energy(state, p):
    """Ranks of `EnergyThreshold`, by NumPy."""
    ranks = {}
    for name in LAYERS:
        s = np.linalg.svd(state[f"{name}.weight"].double().numpy(), compute_uv=False)
        errors = [np.sqrt((s[r:] ** 2).sum()) for r in range(len(s) + 1)]
        ranks[f"net.{name}"] = next(r for r, error in enumerate(errors) if error <= (1 - p) * errors[0])
    return ranks


def ranks_of(choices):
    return {name: choice.rank[0] for name, choice in choices.items()}


def as_logged(choices):
    return {f"lowrank/rank/{name}": float(rank) for name, rank in ranks_of(choices).items()}


def printed(text):
    """The rank that a printed table has for each layer."""
    return {name: int(re.search(rf"{re.escape(name)} +svd +(\d+) ", text)[1]) for name in ("net.fc1", "net.fc2")}


def rank(weight):
    return int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_sixteen_distortions_at_the_ranks_of_the_first(tmp_path, rule, capsys):
    counted = Counted(rule)
    run = fit(tmp_path, counted)
    expected = asked(rule, run.before[2])
    if isinstance(rule, EnergyThreshold):
        assert ranks_of(expected) == by_energy(run.before[2], rule.p)
        assert expected != asked(rule, run.before[STEPS])  # what asking again would have come to
    assert run.distorted == list(range(2, STEPS + 1, 2))
    assert len(run.distorted) == 16
    assert counted.answers == [expected]
    assert run.chosen[1] is None
    assert all(run.chosen[step] == expected for step in range(2, STEPS + 1))
    assert run.callback.choices == run.callback.distortion.choices == expected
    for step in run.distorted:
        found = {f"net.{name}": rank(run.after[step][f"{name}.weight"]) for name in LAYERS}
        assert found == ranks_of(expected)
    text = capsys.readouterr().out
    assert text.count("Low-rank structures") == 1
    assert printed(text) == ranks_of(expected)
    assert run.logged == [(2, as_logged(expected))]
    structures = {layer.name: layer.structure for layer in run.extract.report.layers}
    r1, r2 = (expected[f"net.{name}"].rank[0] for name in LAYERS)
    assert structures == {"fc1": f"{r1} > 30", "fc2": f"{r2} > 20", "fc3": "dense"}
    assert run.extract.extracted.fc1[0].out_features == r1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_checkpoint_keeps_them(tmp_path, rule, capsys):
    whole = fit(tmp_path / "whole", rule, steps=12, save=True)
    chosen = ranks_of(whole.callback.choices)
    capsys.readouterr()
    for step in (1, 2, 3, 7, 11):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        (state,) = (s for key, s in torch.load(path, weights_only=True)["callbacks"].items() if "DeepTwist" in key)
        assert state["ranks"] == (None if step < 2 else {name: [r] for name, r in chosen.items()})
        counted = Counted(rule)
        run = fit(tmp_path / str(step), counted, steps=12, ckpt_path=path)
        assert len(counted.answers) == (1 if step < 2 else 0)
        assert run.callback.choices == whole.callback.choices
        assert all(distance(after, whole.after[k]) == 0 for k, after in run.after.items())
        assert distance(weights(run.module.net), weights(whole.module.net)) == 0
        text = capsys.readouterr().out
        assert text.count("Low-rank structures") == 1
        assert printed(text) == chosen
        assert run.logged == ([(2, as_logged(whole.callback.choices))] if step < 2 else [])


@pytest.mark.parametrize("rule", SHAPES_ALONE, ids=lambda rule: type(rule).__name__)
def test_ranks_that_follow_from_shapes_are_chosen_at_the_start(tmp_path, rule, capsys):
    counted = Counted(rule)
    run = fit(tmp_path, counted, S_D=5, steps=12)
    expected = asked(rule, weights(Small()))
    assert counted.answers == [expected]
    assert all(chosen == expected for chosen in run.chosen.values())
    assert set(run.chosen) == set(range(1, 13))
    assert run.logged == [(1, as_logged(expected))]
    text = capsys.readouterr().out
    assert text.count("Low-rank structures") == 1
    assert printed(text) == ranks_of(expected)
    assert run.distorted == [5, 10]


def test_one_rule_that_looks_at_weights_makes_all_wait(tmp_path):
    run = fit(tmp_path, {"*.fc1": FixedRank(3), "*": EnergyThreshold(0.7)}, S_D=5, steps=6)
    assert run.chosen[4] is None
    assert ranks_of(run.chosen[5]) == {"net.fc1": 3, "net.fc2": by_energy(run.before[5], 0.7)["net.fc2"]}


@pytest.mark.parametrize("rule", [EnergyThreshold(0.7), FixedRank(3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    ("S_D", "choose_at", "distorted"),
    [(2, 7, [7, 8, 10, 12]), (2, 8, [8, 10, 12]), (3, 6, [6, 9, 12]), (5, 0, [5, 10]), (2, 13, [])],
)
def test_nothing_is_distorted_before_choose_at(tmp_path, rule, S_D, choose_at, distorted):
    counted = Counted(rule)
    run = fit(tmp_path, counted, S_D, steps=12, choose_at=choose_at)
    plain, watch = small(), Weights()
    quiet_trainer(tmp_path, watch, max_steps=12).fit(plain, loader())
    first = distorted[0] if distorted else 13
    assert run.distorted == distorted
    assert all(distance(run.after[step], watch.after[step]) == 0 for step in range(1, first))
    assert all((run.chosen[step] is None) == (not rule.sees_shapes_alone) for step in range(1, first))
    expected = asked(rule, watch.after[min(first, 12)])  # training ends on a distortion, whatever `choose_at` says
    assert run.callback.choices == expected
    assert counted.answers == [expected]
    assert {f"net.{name}": rank(run.module.net.get_submodule(name).weight.detach()) for name in LAYERS} == ranks_of(
        expected
    )


def test_choose_at_holds_for_resumed_runs(tmp_path):
    whole = fit(tmp_path / "whole", EnergyThreshold(0.7), 2, steps=12, save=True, choose_at=7)
    for step in (3, 6, 7, 9):
        path = tmp_path / "whole" / f"step={step}.ckpt"
        run = fit(tmp_path / str(step), EnergyThreshold(0.7), 2, steps=12, ckpt_path=path, choose_at=7)
        assert run.distorted == [k for k in (7, 8, 10, 12) if k > step]
        assert distance(weights(run.module.net), weights(whole.module.net)) == 0


@pytest.mark.parametrize("choose_at", [-1, True, 2.0, "7", None])
def test_bad_choose_at(choose_at):
    with pytest.raises(ValueError, match=f"choose_at.*{choose_at}"):
        DeepTwist(choose_at=choose_at)


class Watched(StepData):
    """Notes the weights of every validation."""

    def __init__(self):
        super().__init__(Small(), adam)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen.append((self.trainer.global_step, weights(self.net)))


def test_validation_before_the_choice_is_provisional(tmp_path, capsys):
    """Steps 6, 12 and 18 are validated, and the first distortion follows step 9."""
    rule = Counted(EnergyThreshold(0.7))
    run = fit(tmp_path, rule, S_D=9, steps=3 * EPOCH, module=Watched(), validate=True)
    provisional, chosen = by_energy(run.before[6], 0.7), by_energy(run.before[9], 0.7)
    assert provisional != chosen
    assert [step for step, _ in run.module.seen] == [6, 12, 18]
    for step, seen in run.module.seen:
        ranks = provisional if step == 6 else chosen
        for name in LAYERS:
            expected = svd(run.after[step][f"{name}.weight"], ranks[f"net.{name}"])
            assert torch.allclose(seen[f"{name}.weight"].double(), expected.double(), atol=1e-6)
    assert run.chosen[8] is None
    assert ranks_of(run.callback.choices) == chosen
    assert [ranks_of(answer) for answer in rule.answers] == [provisional, chosen]
    assert run.logged == [(9, as_logged(run.callback.choices))]
    assert printed(capsys.readouterr().out) == chosen
    alone = fit(tmp_path, EnergyThreshold(0.7), S_D=9, steps=3 * EPOCH)
    assert all(distance(alone.after[step], run.after[step]) == 0 for step in alone.after)


@pytest.mark.parametrize("rule", [EnergyThreshold(0.7), FixedRank(3)], ids=lambda rule: type(rule).__name__)
def test_checkpoints_of_before_they_were_kept(tmp_path, rule):
    fit(tmp_path, rule, S_D=3, steps=12, save=True)
    stored = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    (state,) = (s for key, s in stored["callbacks"].items() if "DeepTwist" in key)
    del state["ranks"]
    torch.save(stored, tmp_path / "old.ckpt")
    counted = Counted(rule)
    run = fit(tmp_path / "again", counted, S_D=3, steps=12, ckpt_path=tmp_path / "old.ckpt")
    assert run.distorted == [9, 12]
    expected = asked(rule, run.before[9])
    assert counted.answers == [expected]
    assert (run.chosen[8] is None) == (not rule.sees_shapes_alone)
    assert run.callback.choices == expected
    assert len(run.logged) == 1


def test_a_second_fit_chooses_anew(tmp_path):
    rule, module, watch = Counted(EnergyThreshold(0.7)), small(), Weights()
    loop = quiet_trainer(tmp_path, watch, DeepTwist(4, "svd", rule), max_steps=6)
    loop.fit(module, loader())
    loop.fit_loop.epoch_loop.max_steps = 12
    loop.fit(module, loader())
    assert [ranks_of(answer) for answer in rule.answers] == [by_energy(watch.after[step], 0.7) for step in (4, 8)]


def test_another_network_of_the_same_layers_is_evaluated_at_the_ranks_chosen(tmp_path):
    run = fit(tmp_path, EnergyThreshold(0.7), steps=6)
    other = Watched()
    quiet_trainer(tmp_path, run.callback).validate(other, loader(1), verbose=False)
    for name in LAYERS:
        assert rank(other.seen[0][1][f"{name}.weight"]) == run.callback.choices[f"net.{name}"].rank[0]


def test_choices_are_not_carried_over_to_other_layers(tmp_path):
    class Shallow(Small):
        def __init__(self):
            super().__init__()
            self.fc2, self.fc3 = nn.Identity(), nn.Linear(30, 4)

    run = fit(tmp_path, EnergyThreshold(0.7), steps=6)
    other = Watched()
    other.net = Shallow()
    quiet_trainer(tmp_path, run.callback).validate(other, loader(1), verbose=False)
    assert run.callback.choices is None
    (expected,) = make_plan(Shallow(), "svd", EnergyThreshold(0.7)).choose_ranks().values()
    assert rank(other.seen[0][1]["fc1.weight"]) == expected.rank[0]


@pytest.mark.parametrize("rule", [EnergyThreshold(0.7), FixedRank(3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("S_D", [1, 4])
def test_batches_that_are_skipped_before_the_first_that_runs(tmp_path, capsys, rule, S_D):
    """`training_step` may return None: no layer has run then, and there is nothing to plan yet."""

    class Skipping(StepData):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 1) else super().training_step(batch, batch_idx)

    run = fit(tmp_path, rule, S_D, steps=EPOCH, module=Skipping(Small(), adam))
    assert {c.name for c in run.callback.plan.compressions} == {"net.fc1", "net.fc2"}
    text = capsys.readouterr().out
    assert text.count("Low-rank structures") == 1
    assert printed(text) == ranks_of(run.callback.choices)
    assert isinstance(run.extract.extracted.fc1, nn.Sequential)
