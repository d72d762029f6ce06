"""Phases of a training: what learns in which epoch, at which rate."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_pl import CompressionRatio, compress
from lowrank_pl.decompositions import LowRankPlusSparse
from lowrank_pl.module import Classifier
from lowrank_pl.runs import Phase, Training
from lowrank_pl.runs.phases import Phases
from lowrank_pl.schedules import cosine
from lowrank_pl.targets import Targets

PHASES = {
    "convolutions": Phase(2, "linear"),
    "linear": Phase(1, "convolutions", 0.5),
    "all": Phase(2, None, 0.1),
}


class Watch(pl.Callback):
    """Notes which parameters an epoch has changed, and the rates of its steps."""

    def __init__(self):
        self.moved, self.rates, self.momenta = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.momenta.append(len(trainer.optimizers[0].state))
        self.before = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.moved.append({n for n, p in pl_module.net.named_parameters() if not torch.equal(p, self.before[n])})


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )
    return compress(net, LowRankPlusSparse(run="dense"), CompressionRatio(1.5), Targets(skip_first=False))


def fit(net, training, callbacks):
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 3), 8)
    module = Classifier(net, training.optimizer, training.schedule)
    trainer = pl.Trainer(
        max_epochs=training.length, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


@pytest.mark.filterwarnings("ignore")
def test_what_learns_and_how_fast():
    net, watch = make_net(), Watch()
    every = {name for name, _ in net.named_parameters()}
    linear = {name for name in every if name.startswith("6.")}
    training = Training(sgd, cosine, phases=PHASES)
    assert training.length == 5
    fit(net, training, [Phases(training.phases), watch])
    others = every - linear
    assert watch.moved == [others, others, linear, every, every]
    expected = [0.1 * share * (1 + math.cos(math.pi * i / n)) / 2
                for n, share in ((6, 1.0), (3, 0.5), (6, 0.1)) for i in range(n)]  # fmt: skip
    assert watch.rates == pytest.approx(expected)
    assert watch.momenta == [0, len(others), 0, 0, len(every)]  # every phase begins without any
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_phase_without_anything_to_train():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    training = Training(sgd, phases={"first": Phase(1, "linear")})
    with pytest.raises(ValueError, match="Phase 'first' has nothing to train: all layers are linear"):
        fit(net, training, [Phases(training.phases)])


def test_arguments():
    with pytest.raises(ValueError, match="`epochs` to be left out"):
        Training(sgd, epochs=3, phases=PHASES)
    for bad in ({"epochs": 0}, {"epochs": 1, "fixed": "norms"}, {"epochs": 1, "lr_factor": 0.0}):
        with pytest.raises(ValueError, match="Expected argument"):
            Phase(**bad)
