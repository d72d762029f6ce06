"""ADMM on two processes (gloo): equal channels, ranks and weights, although their decompositions differ."""

from dataclasses import replace

import pytest
import pytorch_lightning as pl
from killing import in_two_processes
from nets import Module, Net, loader, quiet_trainer
from test_lc_processes import Watch, alike

from lowrank_pl import ADMM, ExtractStructure
from lowrank_pl.linalg.admm import ADMMState

pytestmark = pytest.mark.filterwarnings("ignore:ADMM has ended")


class Disagree(pl.Callback):
    """The second process's B would come out of rank 1."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            fitted = ADMMState.fitted

            def different(state, norms, rounds):
                found = fitted(state, norms, rounds)
                return replace(found, b=found.b[..., :1] @ found.b[..., :1, :])

            ADMMState.fitted = different


def work(folder):
    """What each process does."""
    callback = ADMM(0.05, 0.05, steps=4, l_step_epochs=1)
    extract = ExtractStructure(folder / "compressed", submodule="net")

    def seen():
        sizes = {name: list(size) for name, size in callback.state.sizes().items()}
        return {name: layer.anchor for name, layer in callback.state.layers.items()}, sizes

    callbacks = [Disagree(), callback, extract, Watch(folder, seen)]
    quiet_trainer(folder, *callbacks, strategy="ddp", devices=2, max_epochs=9).fit(Module(Net()), loader())


@pytest.mark.timeout(300)
def test_both_hold_what_the_first_found(tmp_path):
    in_two_processes(work, tmp_path)
    one = alike(tmp_path)
    assert any(rank > 1 for rank, _ in one[9][2].values())
