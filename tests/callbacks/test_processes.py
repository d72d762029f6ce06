"""Two processes (gloo): one decides, both hold the same weights."""

import pytest
import pytorch_lightning as pl
import torch
from killing import in_two_processes
from nets import Module, Net, distance, loader, quiet_trainer, ranks, weights

from lowrank_pl import CostBudget, DeepTwist, EnergyThreshold, ExtractStructure, FixedRank, Targets
from lowrank_pl.compression import Plan


class Disagree(pl.Callback):
    """The second process must not be asked for ranks, and its projections come out slightly different."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            original = Plan.factor

            def refuse(plan, problems=None):
                raise AssertionError("asked")

            def factor(plan, choices, problems=None):
                structures = original(plan, choices, problems)
                for structure in structures.values():
                    structure.tensors[0].mul_(1.00001)
                return structures

            Plan.choose_ranks, Plan.factor = refuse, factor


class Watch(pl.Callback):
    """Everything that this process saw, in a file of its own."""

    def __init__(self, folder):
        self.folder, self.after, self.validated = folder, {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step] = weights(pl_module.net)

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(weights(pl_module.net))

    def on_fit_end(self, trainer, pl_module):
        seen = {"after": self.after, "validated": self.validated, "end": weights(pl_module.net)}
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")
        trainer.save_checkpoint(self.folder / "after.ckpt")


def equal_weights(folder):
    """What each process of the first test does."""
    callback = DeepTwist(2, "svd", FixedRank(2), Targets(), recalibrate_bn=1, monitor_loss=True)
    extract = ExtractStructure(folder / "compressed", submodule="net")
    callbacks = [Disagree(), callback, extract, Watch(folder)]
    loop = quiet_trainer(folder, *callbacks, strategy="ddp", devices=2, max_epochs=1, num_sanity_val_steps=0)
    loop.fit(Module(Net(norm=True)), loader(), loader(2))


@pytest.mark.timeout(300)
def test_both_hold_the_weights_of_the_first(tmp_path):
    in_two_processes(equal_weights, tmp_path)
    net = Net(norm=True)
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    names = [name for name in one["end"] if not name.startswith("norm.") or "weight" in name]
    for step in (1, 2, 3):
        assert all(torch.equal(one["after"][step][n], two["after"][step][n]) for n in names)
    for a, b in [*zip(one["validated"], two["validated"], strict=True), (one["end"], two["end"])]:
        assert all(torch.equal(a[n], b[n]) for n in names)
    assert all(torch.equal(one["end"][n], two["end"][n]) for n in one["end"])  # the re-estimated ones too
    low = []
    for state in (one["after"][1], one["after"][2], one["after"][3], one["validated"][0], one["end"]):
        net.load_state_dict(state)
        low.append(set(ranks(net).values()) == {2})
    assert low == [False, True, False, True, True]
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert distance({n.removeprefix("net."): t for n, t in state.items()}, one["after"][3]) == 0
    assert (tmp_path / "compressed" / "model.safetensors").is_file()


class Choices(pl.Callback):
    """The ranks and the weights that this process has at the end, in a file of its own."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_fit_end(self, trainer, pl_module):
        ranks = {name: list(choice.rank) for name, choice in self.callback.choices.items()}
        torch.save((ranks, weights(pl_module.net)), self.folder / f"choices{trainer.global_rank}.pt")


def chosen_in_the_middle(folder):
    """At step 2, and for a validation before that."""
    callback = DeepTwist(2, "svd", EnergyThreshold(0.5))
    callbacks = [Disagree(), callback, Choices(folder, callback)]
    limits = {"max_epochs": 1, "val_check_interval": 1, "num_sanity_val_steps": 0}
    loop = quiet_trainer(folder, *callbacks, strategy="ddp", devices=2, **limits)
    loop.fit(Module(Net()), loader(), loader(2))


@pytest.mark.timeout(300)
def test_ranks_that_follow_from_weights_are_the_first_ones(tmp_path):
    in_two_processes(chosen_in_the_middle, tmp_path)
    (one, state), (two, other) = (torch.load(tmp_path / f"choices{i}.pt", weights_only=True) for i in (0, 1))
    assert one == two
    assert distance(state, other) == 0
    net = Net()
    net.load_state_dict(state)
    assert {f"net.{name.removesuffix('.weight')}": [rank] for name, rank in ranks(net).items()} == one


def unreachable(folder):
    """A budget that the first process alone finds out to be too small."""
    callback = DeepTwist(2, "svd", CostBudget("macs", 1e-3))
    loop = quiet_trainer(folder, Disagree(), callback, strategy="ddp", devices=2, max_epochs=1)
    with pytest.raises(ValueError, match=r"A budget of 0\.001 of the dense cost"):
        loop.fit(Module(Net()), loader())


@pytest.mark.timeout(300)
def test_a_rule_that_cannot_choose_stops_both(tmp_path):
    """It fails on the first process alone; the second one must not wait for ever."""
    in_two_processes(unreachable, tmp_path)
