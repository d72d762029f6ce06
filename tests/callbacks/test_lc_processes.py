"""Learning-compression on two processes (gloo): equal ranks, equal weights, although their decompositions differ."""

import pytest
import pytorch_lightning as pl
import torch
from killing import in_two_processes
from nets import Module, Net, loader, quiet_trainer, weights

from lowrank_pl import SVD, ExtractStructure, LearningCompression
from lowrank_pl.decompositions import Choice
from lowrank_pl.ranks import CostPenalty, RankProblem


class Disagree(pl.Callback):
    """The second process would choose other ranks, and its projections come out slightly different."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            choose, factor = CostPenalty.__call__, RankProblem.structure

            def others(rule, *arguments):
                return [Choice(SVD(), (1,)) for _ in choose(rule, *arguments)]

            def different(problem, choice):
                structure = factor(problem, choice)
                return structure.with_tensors([1.001 * tensor for tensor in structure.tensors])

            CostPenalty.__call__, RankProblem.structure = others, different


class Watch(pl.Callback):
    """What this process has after every step, weights and what `seen` says (anchors, ranks), and at the end, in a file
    of its own."""

    def __init__(self, folder, seen):
        self.folder, self.seen, self.after = folder, seen, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step] = (weights(pl_module.net), *self.seen())

    def on_fit_end(self, trainer, pl_module):
        self.after[-1] = (weights(pl_module.net), {}, {})
        torch.save(self.after, self.folder / f"rank{trainer.global_rank}.pt")


def alike(folder):
    """What the first of two processes has written, after it has been compared with the second's."""
    one, two = (torch.load(folder / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert one.keys() == two.keys()
    assert len(one) == 10  # three epochs of three steps, and the end
    for step, (state, anchors, ranks) in one.items():
        assert ranks == two[step][2]
        assert all(torch.equal(state[name], two[step][0][name]) for name in state)
        assert all(torch.equal(anchors[name], two[step][1][name]) for name in anchors)
    assert (folder / "compressed" / "model.safetensors").is_file()
    return one


def work(folder):
    """What each process does."""
    callback = LearningCompression(30.0, steps=4, mu0=0.05, growth=1.5, l_step_epochs=1)
    extract = ExtractStructure(folder / "compressed", submodule="net")

    def seen():
        ranks = {name: list(choice.rank) for name, choice in callback.state.choices.items()}
        return dict(callback.state.anchors), ranks

    callbacks = [Disagree(), callback, extract, Watch(folder, seen)]
    quiet_trainer(folder, *callbacks, strategy="ddp", devices=2, max_epochs=9).fit(Module(Net()), loader())


@pytest.mark.timeout(300)
def test_both_hold_what_the_first_chose(tmp_path):
    in_two_processes(work, tmp_path)
    one = alike(tmp_path)
    assert any(rank not in ([1], [0]) for rank in one[9][2].values())
