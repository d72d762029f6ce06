"""Validation, test and prediction see what would be deployed; training does not."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Module, Net, Weights, distance, images, loader, quiet_trainer, ranks, svd, target_weights, weights
from pytorch_lightning.callbacks import ModelCheckpoint

from lowrank_pl import DeepTwist, ExtractStructure, FixedRank


class Watched(Module):
    """Notes the rank of its weights in every kind of step."""

    def __init__(self, net=None):
        super().__init__(net)
        self.ranks = {"train": [], "val": [], "test": [], "predict": []}
        self.sanity = []

    def note(self, stage):
        self.ranks[stage].append(max(ranks(self.net).values()))

    def training_step(self, batch, batch_idx):
        self.note("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            self.sanity.append(max(ranks(self.net).values()))
        else:
            self.note("val")
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.note("test")
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.note("predict")
        return super().predict_step(batch, batch_idx)


def twist(S_D=100, **arguments):
    return DeepTwist(S_D, "svd", FixedRank(2), **arguments)


def test_low_rank_in_validation_and_not_in_training(tmp_path):
    module, plain = Watched(), Watched()
    runs = [(module, twist()), (plain, twist(evaluate_distorted=False))]
    after = []
    for net, callback in runs:
        watch = Weights()
        loop = quiet_trainer(tmp_path, callback, watch, max_epochs=2, val_check_interval=2)
        loop.fit(net, loader(), loader(2))
        after.append(watch.after)
    assert module.ranks["val"] == [2] * 2 * 6
    assert min(module.ranks["train"]) > 2
    assert min(plain.ranks["val"]) > 2
    assert all(distance(after[0][k], after[1][k]) == 0 for k in after[0])  # the same training, bit for bit
    assert module.sanity == [12 + 4] * len(module.sanity)  # full rank: nothing has been trained yet


def test_validation_weights_are_the_projection_of_the_training_weights(tmp_path):
    module, watch = Module(), Weights()
    loop = quiet_trainer(tmp_path, twist(), watch, max_epochs=1, num_sanity_val_steps=0)
    loop.fit(module, loader(), loader(1))
    (seen,) = module.seen
    for name, weight in seen.items():
        assert torch.allclose(weight.double(), svd(watch.after[6][name], 2).double(), atol=1e-6)


def test_the_metric_is_that_of_the_deployed_network(tmp_path):
    module, extract = Module(Net(norm=True)), ExtractStructure(submodule="net")
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    loop = quiet_trainer(tmp_path, twist(), best, extract, max_epochs=1, enable_checkpointing=True)
    loop.fit(module, loader(), loader(1, seed=7))
    x, y = images(1, seed=7)
    with torch.no_grad():
        expected = F.cross_entropy(extract.extracted.eval()(x), y)
    assert float(loop.callback_metrics["val_loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(best.best_model_score) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["test", "validate", "predict"])
def test_without_a_fit(tmp_path, kind):
    module, callback = Watched(), twist()
    before = weights(module.net)
    loop = quiet_trainer(tmp_path, callback)
    quiet = {} if kind == "predict" else {"verbose": False}
    results = getattr(loop, kind)(module, loader(1), **quiet)
    assert module.ranks["val" if kind == "validate" else kind] == [2]
    assert distance(before, weights(module.net)) == 0
    if kind != "predict":
        low = Net()
        with torch.no_grad():
            for name, weight in target_weights(low).items():
                low.get_submodule(name.removesuffix(".weight")).weight.copy_(svd(weight, 2))
            x, y = images(1)
            expected = float(F.cross_entropy(low(x), y))
        assert next(iter(results[0].values())) == pytest.approx(expected, rel=1e-5)


def test_test_of_a_checkpoint(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    module = Watched()
    loop = quiet_trainer(tmp_path, twist(4), best, max_epochs=2, enable_checkpointing=True)
    loop.fit(module, loader(), loader(1))
    (tested,) = loop.test(module, loader(1), ckpt_path="best", verbose=False, weights_only=True)
    assert module.ranks["test"] == [2]
    assert tested["test_loss"] == pytest.approx(float(best.best_model_score), rel=1e-5)
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert distance({f"net.{n}": t for n, t in weights(module.net).items()}, state) == 0


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["fit", "validate"])
def test_an_exception_in_between_restores_the_weights(tmp_path, error, kind):
    class Broken(Module):
        def validation_step(self, batch, batch_idx):
            self.inside = weights(self.net)
            raise error

    module, watch = Broken(), Weights()
    if kind == "validate":
        watch.after[6] = weights(module.net)
    loop = quiet_trainer(tmp_path, twist(), watch, max_epochs=2, num_sanity_val_steps=0)
    with pytest.raises((RuntimeError, SystemExit)):
        loop.fit(module, loader(), loader(1)) if kind == "fit" else loop.validate(module, loader(1))
    assert max(ranks_of(module.inside)) == 2
    if isinstance(error, RuntimeError) or kind == "validate":
        assert distance(weights(module.net), watch.after[6]) == 0
    else:
        assert max(ranks_of(weights(module.net))) == 2  # training was interrupted: it ends on a distortion


def ranks_of(state):
    net = Net()
    net.load_state_dict(state)
    return list(ranks(net).values())


def test_sanity_check_and_first_validation_leave_no_plan_behind(tmp_path):
    """The plan is made from the first training batch, whatever ran before."""
    module, callback = Watched(), twist(3)
    quiet_trainer(tmp_path, callback).validate(module, loader(1), verbose=False)
    loop = quiet_trainer(tmp_path, callback, max_epochs=1)
    loop.fit(module, loader(), loader(1))
    assert callback.trace is not None
    assert set(callback.trace.calls) == {"net.conv1", "net.conv2", "net.fc1", "net.fc2"}


def test_evaluation_inside_inference_mode_leaves_trainable_weights(tmp_path):
    """Lightning validates in inference mode; the weights must not become inference tensors."""

    class Check(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            flags.append(any(p.is_inference() for p in pl_module.parameters()))

    flags, module = [], Module()
    for mode in (True, False):
        loop = quiet_trainer(tmp_path, twist(2), Check(), max_epochs=2, inference_mode=mode)
        loop.fit(module, loader(), loader(1))
    assert flags
    assert not any(flags)


def test_weights_that_are_not_finite_in_validation(tmp_path):
    module = Module()
    with torch.no_grad():
        module.net.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc1"):
        quiet_trainer(tmp_path, twist()).validate(module, loader(1), verbose=False)
    assert torch.equal(module.net.conv2.weight, Net().conv2.weight)
