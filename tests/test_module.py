"""The classifier, with and without a Trainer."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_pl.data import Digits
from lowrank_pl.models import LeNet5, LeNet300
from lowrank_pl.module import Classifier
from lowrank_pl.schedules import cosine

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(root, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=root, accelerator="cpu", enable_checkpointing=False, **quiet | arguments)


def test_learns(tmp_path):
    pl.seed_everything(0)
    data = Digits(size=16, val_fraction=0.2, batch_size=32)
    module = Classifier(LeNet5(input_shape=(1, 16, 16)), SGD, cosine)
    loop = trainer(tmp_path, max_epochs=1)
    loop.fit(module, data)
    logged = loop.callback_metrics
    assert set(logged) == {"train/loss", "val/loss", "val/accuracy"}
    assert logged["val/accuracy"] > 0.5  # by chance 0.1
    (tested,) = loop.test(module, data, verbose=False)
    assert tested["test/accuracy"] > 0.5  # by chance 0.1


def test_metrics_are_means_over_images(tmp_path):
    data = Digits(size=None, eval_batch_size=100)  # batches of 100, 100, 100 and 60
    module = Classifier(LeNet300(input_shape=(1, 8, 8)), SGD)
    (tested,) = trainer(tmp_path).test(module, data, verbose=False)
    images, labels = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    logits = module(images)
    assert tested["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(("accumulate", "steps_per_epoch"), [(1, 12), (5, 3)])
def test_schedule_counts_optimizer_steps(tmp_path, accumulate, steps_per_epoch):
    seen = {}

    def schedule(optimizer, total_steps, steps_per_epoch):
        seen.update(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        return cosine(optimizer, total_steps, steps_per_epoch)

    module = Classifier(LeNet300(input_shape=(1, 8, 8)), SGD, schedule)
    loop = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    loop.fit(module, Digits(size=None, batch_size=128))  # 1,437 images: 12 batches
    assert seen == {"total_steps": 2 * steps_per_epoch, "steps_per_epoch": steps_per_epoch}
    assert loop.global_step == 2 * steps_per_epoch
    assert loop.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_channels_last():
    seen = []
    net = LeNet5()
    net.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    module, plain = Classifier(net, SGD, channels_last=True), Classifier(LeNet5(), SGD)
    plain.load_state_dict(module.state_dict())
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(module.eval()(x), plain.eval()(x))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.net.conv2.weight.is_contiguous()


def test_loss_of_an_epoch_with_label_smoothing(tmp_path):
    data = Digits(size=None, batch_size=1000)  # batches of 1,000 and 437
    net = LeNet300(input_shape=(1, 8, 8))
    module = Classifier(net, partial(torch.optim.SGD, lr=0.0), label_smoothing=0.2)
    loop = trainer(tmp_path, max_epochs=1)
    loop.fit(module, data)
    images, labels = map(torch.cat, zip(*data.train_dataloader(), strict=True))
    expected = F.cross_entropy(net(images), labels, label_smoothing=0.2).item()
    assert loop.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    (tested,) = loop.test(module, data, verbose=False)
    images, labels = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(net(images), labels).item(), rel=1e-5)


def test_adds_no_tensors_of_its_own():
    assert all(name.startswith("net.") for name in Classifier(nn.Linear(2, 2), SGD).state_dict())


def test_bad_label_smoothing():
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        Classifier(nn.Linear(2, 2), SGD, label_smoothing=1)
