"""Checkpoints hold training weights; a resumed run is the uninterrupted one."""

import pytest
import pytorch_lightning as pl
import torch
from nets import (
    EPOCH,
    PROJECTIONS,
    Module,
    Net,
    StepData,
    TwoOptimizers,
    Weights,
    bare_loop,
    distance,
    loader,
    quiet_trainer,
    ranks,
    weights,
)
from pytorch_lightning.callbacks import ModelCheckpoint

from lowrank_pl import DeepTwist, FixedRank, LearningCompression, Targets

S_D = 4


def every_step(folder, **arguments):
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False, **arguments
    )


def read(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("net.").replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def fit(root, module, *callbacks, ckpt_path=None, validate=True, **arguments):
    arguments = {"enable_checkpointing": True, "max_epochs": 2} | arguments
    loop = quiet_trainer(root, DeepTwist(S_D, "svd", FixedRank(2)), *callbacks, **arguments)
    loop.fit(module, loader(), loader(1) if validate else None, ckpt_path=ckpt_path, weights_only=True)
    return loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three epochs without a stop; a checkpoint after every step."""
    folder, watch = tmp_path_factory.mktemp("whole"), Weights()
    module = StepData()
    fit(folder, module, watch, every_step(folder), max_epochs=3)
    return folder, watch.after, weights(module.net)


def test_every_checkpoint_holds_the_weights_after_its_step(whole):
    folder, after, _ = whole
    expected = bare_loop(Net(), 3 * EPOCH, range(S_D, 3 * EPOCH + 1, S_D), PROJECTIONS["svd"])
    for step in range(1, 3 * EPOCH + 1):
        state = read(folder / f"step={step}.ckpt")
        assert distance(state, after[step]) == 0
        assert distance(state, expected[step]) < 2e-5


@pytest.mark.parametrize("step", range(1, 3 * EPOCH + 1))
def test_resumed_at_every_step(whole, tmp_path, step):
    folder, after, last = whole
    module, watch = StepData(), Weights()
    fit(tmp_path, module, watch, ckpt_path=folder / f"step={step}.ckpt", max_epochs=3)
    assert sorted(watch.after) == list(range(step + 1, 3 * EPOCH + 1))
    assert all(distance(state, after[k]) == 0 for k, state in watch.after.items())
    assert distance(weights(module.net), last) == 0


@pytest.mark.parametrize("end", ["epochs", "interrupt", "error"])
def test_resumed_with_more_epochs(whole, tmp_path, end):
    """A run that ended at step 6 or 9, with a distortion in memory only, goes on."""
    _, after, last = whole
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True, every_n_epochs=1, filename="x")
    first = StepData()

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if end != "epochs" and trainer.global_step == 9:
                raise KeyboardInterrupt if end == "interrupt" else RuntimeError("a real error")

    try:
        fit(tmp_path, first, Break(), checkpoint, max_epochs=1 if end == "epochs" else 3)
    except (SystemExit, RuntimeError):
        assert end != "epochs"
    assert (set(ranks(first.net).values()) == {2}) == (end != "error")
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])
    step = torch.load(paths[-1], weights_only=True)["global_step"]
    assert step == (6 if end == "epochs" else 9)
    assert distance(read(paths[-1]), after[step]) == 0
    module, watch = StepData(), Weights()
    fit(tmp_path, module, watch, ckpt_path=paths[-1], max_epochs=3)
    assert all(distance(state, after[k]) == 0 for k, state in watch.after.items())
    assert distance(weights(module.net), last) == 0


def test_resuming_a_finished_run_ends_on_the_same_distortion(whole, tmp_path):
    """Nothing is left to train, and Lightning calls no `on_train_end`; the weights in memory are projected anyway."""
    folder, _, last = whole
    module = StepData()
    fit(tmp_path, module, ckpt_path=folder / f"step={3 * EPOCH}.ckpt", max_epochs=3)
    assert distance(weights(module.net), last) == 0


def test_saving_after_the_fit(tmp_path):
    module, watch = StepData(), Weights()
    loop = fit(tmp_path, module, watch, max_epochs=1)
    last = weights(module.net)
    loop.save_checkpoint(tmp_path / "after.ckpt")
    assert distance(read(tmp_path / "after.ckpt"), watch.after[EPOCH]) == 0
    loop.test(module, loader(1), verbose=False)
    loop.save_checkpoint(tmp_path / "tested.ckpt")
    assert distance(read(tmp_path / "tested.ckpt"), watch.after[EPOCH]) == 0
    assert distance(weights(module.net), last) == 0


def test_saving_after_training_weights_were_looked_at(tmp_path):
    module, watch = StepData(), Weights()
    loop = fit(tmp_path, module, watch, max_epochs=1)
    last, callback = weights(module.net), loop.callbacks[0]
    with callback.training_weights():
        assert distance(weights(module.net), watch.after[EPOCH]) == 0
    assert distance(weights(module.net), last) == 0
    loop.test(module, loader(1), verbose=False)
    loop.save_checkpoint(tmp_path / "after.ckpt")
    assert distance(read(tmp_path / "after.ckpt"), watch.after[EPOCH]) == 0


class SaveInside(pl.Callback):
    """Writes a checkpoint where the module holds projected weights."""

    def __init__(self, path):
        self.path = path

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.projected = weights(pl_module.net)
            trainer.save_checkpoint(self.path)


def test_saving_during_validation(tmp_path):
    module, watch, save = StepData(), Weights(), SaveInside(tmp_path / "inside.ckpt")
    fit(tmp_path, module, watch, save, max_epochs=1)
    assert distance(read(save.path), watch.after[EPOCH]) == 0
    assert distance(save.projected, watch.after[EPOCH]) > 1e-3
    module, more = StepData(), Weights()
    fit(tmp_path, module, more, ckpt_path=save.path, max_epochs=2)
    expected = bare_loop(Net(), 12, (4, 8, 12), PROJECTIONS["svd"])
    assert distance(more.after[12], expected[12]) < 2e-5


def test_checkpoints_chosen_by_a_validation_metric(tmp_path):
    """The file holds training weights; the score is that of the projected ones."""
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    module, watch = StepData(), Weights()
    loop = fit(tmp_path, module, watch, best, max_epochs=3)
    for epoch in range(3):
        state = read(tmp_path / f"epoch={epoch}.ckpt")
        assert distance(state, watch.after[EPOCH * (epoch + 1)]) == 0
    for path, score in best.best_k_models.items():
        (again,) = loop.validate(StepData(), loader(1), ckpt_path=path, verbose=False, weights_only=True)
        assert again["val_loss"] == pytest.approx(float(score), rel=1e-5)


def test_state_is_plain(tmp_path):
    fit(tmp_path, StepData(), every_step(tmp_path), max_epochs=1)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["callbacks"]
    (mine,) = [value for key, value in state.items() if "DeepTwist" in key]
    assert mine["last_step"] == 4
    assert mine["ranks"] == {"net.conv2": [2], "net.fc1": [2]}
    assert len(str(mine)) < 2000  # no samples, no weights


def test_resuming_two_optimizers(tmp_path):
    """Steps 2, 4, ..., 12 of an epoch, distortions after 4, 8 and 12."""

    class Data(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            inputs = loader().dataset.tensors
            i = self.trainer.global_step // 2 % EPOCH * 4
            return super().training_step([t[i : i + 4] for t in inputs], batch_idx)

    module, watch = Data(), Weights()
    fit(tmp_path, module, watch, every_step(tmp_path), validate=False, max_epochs=1)
    for step in (2, 4, 6, 10):
        path = tmp_path / f"step={step}.ckpt"
        again, more = Data(), Weights()
        fit(tmp_path / "again", again, more, ckpt_path=path, validate=False, max_epochs=1)
        assert sorted(more.after) == list(range(step + 2, 13, 2))
        assert all(distance(state, watch.after[k]) == 0 for k, state in more.after.items())
        assert distance(weights(again.net), weights(module.net)) == 0


def test_resuming_under_accumulation(tmp_path):
    """Three batches for a step; data do not depend on the step here, so that any start is the same."""

    class Constant(Module):
        def training_step(self, batch, batch_idx):
            x, y = loader().dataset.tensors
            return super().training_step((x, y), batch_idx)

    def run(module, *callbacks, **arguments):
        loop = quiet_trainer(
            tmp_path,
            DeepTwist(2, "svd", FixedRank(2)),
            *callbacks,
            max_epochs=3,
            accumulate_grad_batches=3,
            enable_checkpointing=True,
        )
        loop.fit(module, loader(), **arguments)

    module, watch = Constant(), Weights()
    run(module, watch, every_step(tmp_path))
    for step in range(1, 6):
        again, more = Constant(), Weights()
        run(again, more, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert all(distance(state, watch.after[k]) == 0 for k, state in more.after.items() if k > step)
        assert distance(weights(again.net), weights(module.net)) == 0


def test_loading_weights_only_files_starts_afresh(tmp_path):
    """`save_weights_only=True` keeps no callback state: `trainer.fit` on such weights is a new training."""
    module = StepData()
    fit(
        tmp_path,
        module,
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_weights_only=True),
        max_epochs=1,
    )
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    fresh = StepData()
    fresh.load_state_dict(state["state_dict"])
    fit(tmp_path, fresh, max_epochs=1)
    assert set(ranks(fresh.net).values()) == {2}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rank": FixedRank(1)}, {1}),
        ({"rank": FixedRank(2), "targets": Targets(include=["*.conv2"])}, {2, 16}),
        ({"rank": FixedRank(2), "method": "block_svd"}, None),
    ],
)
def test_resuming_with_other_arguments_chooses_anew(whole, tmp_path, arguments, expected):
    """The state holds the ranks, and what they were chosen by: a resumed run takes the callback's own."""
    folder, _, _ = whole
    module = StepData()
    loop = quiet_trainer(tmp_path, DeepTwist(S_D, **({"method": "svd"} | arguments)), max_epochs=3)
    with pytest.warns(UserWarning, match=r"were chosen by method='svd', rank=FixedRank\(r=2\).*chosen anew"):
        loop.fit(module, loader(), ckpt_path=folder / "step=7.ckpt", weights_only=True)
    assert expected is None or set(ranks(module.net).values()) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"net.conv2": [2, 2], "net.fc1": [2]}, r"'net\.conv2'.*rank from \(1,\) to \(12,\)"),
        ({}, "'net.conv2' takes part now but has no rank"),
    ],
)
def test_stored_ranks_that_do_not_fit(whole, tmp_path, changed, message):
    """Refused before anything is trained or projected."""
    folder, _, _ = whole
    checkpoint = torch.load(folder / "step=7.ckpt", weights_only=True)
    next(value for key, value in checkpoint["callbacks"].items() if "DeepTwist" in key)["ranks"] = changed
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    module = StepData()
    loop = quiet_trainer(tmp_path, DeepTwist(S_D, "svd", FixedRank(2)), max_epochs=3)
    with pytest.raises(ValueError, match=message):
        loop.fit(module, loader(), ckpt_path=tmp_path / "odd.ckpt", weights_only=True)
    assert distance(weights(module.net), read(folder / "step=7.ckpt")) == 0


def altered(path, folder, *forgotten):
    """A copy of a checkpoint that does not know `conv2`, and is without some of what callbacks keep there."""
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (value for value in checkpoint["callbacks"].values() if "trace" in value)
    state["joined"] = ["net.fc1"]
    for key in ("ranks", "factors", "anchors"):
        state.get("lc", state).get(key, {}).pop("net.conv2", None)
    for key in forgotten:
        state.pop(key)
    torch.save(checkpoint, folder / "altered.ckpt")
    return folder / "altered.ckpt"


def twist():
    return DeepTwist(S_D, "svd", FixedRank(2))


def learn():
    return LearningCompression(1e-2, l_step_steps=3, l_step_epochs=None, steps=5, mu0=0.1)


@pytest.mark.parametrize("make", [twist, learn])
def test_layers_that_an_earlier_version_left_dense(tmp_path, make):
    """No layer could join then, nor did it say which had: those that this version supports more of stay dense."""
    first, second = every_step(tmp_path / "first"), every_step(tmp_path / "second")
    train = lambda *args, start, steps: quiet_trainer(  # noqa: E731
        tmp_path, *args, max_epochs=-1, max_steps=steps, enable_checkpointing=True
    ).fit(StepData(), loader(), ckpt_path=start, weights_only=True)
    train(make(), first, start=None, steps=7)
    old, callback = altered(tmp_path / "first" / "step=7.ckpt", tmp_path, "joined", "left"), make()
    with pytest.warns(UserWarning, match=r"^net\.conv2 took no part .* stay dense"):
        train(callback, second, start=old, steps=9)
    assert [c.name for c in callback.plan.compressions] == ["net.fc1"]
    assert callback.plan.dense["net.conv2"].startswith("dense before")
    again = make()
    train(again, start=tmp_path / "second" / "step=9.ckpt", steps=13)
    assert set(again.distortion.choices) == {"net.fc1"}


@pytest.mark.parametrize("make", [twist, learn])
def test_layers_that_have_thawed_before_a_run_goes_on(tmp_path, make):
    first, callback = every_step(tmp_path / "first"), make()
    quiet_trainer(tmp_path, make(), first, max_steps=7, enable_checkpointing=True).fit(StepData(), loader())
    new = altered(tmp_path / "first" / "step=7.ckpt", tmp_path)
    loop = quiet_trainer(tmp_path, callback, max_epochs=-1, max_steps=13)
    with pytest.warns(UserWarning, match=r"^net\.conv2 took no part .* join now"):
        loop.fit(StepData(), loader(), ckpt_path=new, weights_only=True)
    assert set(callback.distortion.choices) == {"net.conv2", "net.fc1"}
