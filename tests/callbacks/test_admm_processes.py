"""ADMM on two processes (gloo): equal channels, ranks and weights, although their decompositions differ."""

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from killing import in_two_processes
from nets import Module, Net, loader, quiet_trainer, weights

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


class Watch(pl.Callback):
    """What this process has after every step and at the end, in a file of its own."""

    def __init__(self, folder, callback):
        self.folder, self.callback, self.after = folder, callback, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = self.callback.state
        sizes = {name: list(size) for name, size in state.sizes().items()}
        anchors = {name: layer.anchor for name, layer in state.layers.items()}
        self.after[trainer.global_step] = (weights(pl_module.net), anchors, sizes)

    def on_fit_end(self, trainer, pl_module):
        self.after[-1] = (weights(pl_module.net), {}, {})
        torch.save(self.after, self.folder / f"rank{trainer.global_rank}.pt")


def work(folder):
    """What each process does."""
    callback = ADMM(0.05, 0.05, steps=4, l_step_epochs=1)
    extract = ExtractStructure(folder / "compressed", submodule="net")
    callbacks = [Disagree(), callback, extract, Watch(folder, callback)]
    quiet_trainer(folder, *callbacks, strategy="ddp", devices=2, max_epochs=9).fit(Module(Net()), loader())


@pytest.mark.timeout(300)
def test_both_hold_what_the_first_found(tmp_path):
    in_two_processes(work, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert one.keys() == two.keys()
    assert len(one) == 10  # three epochs of three steps, and the end
    for step, (state, anchors, sizes) in one.items():
        assert sizes == two[step][2]
        assert all(torch.equal(state[name], two[step][0][name]) for name in state)
        assert all(torch.equal(anchors[name], two[step][1][name]) for name in anchors)
    assert any(rank > 1 for rank, _ in one[9][2].values())
    assert (tmp_path / "compressed" / "model.safetensors").is_file()
