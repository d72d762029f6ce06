"""What a config may say: what is right passes; what is wrong is in tests/hostile/command_lines.yaml."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger

from lowrank_pl import LearningCompression
from lowrank_pl.cli.mistakes import check_words
from lowrank_pl.cli.schema import arguments, check_config
from lowrank_pl.data import CIFAR10, Digits

RIGHT = [
    "compression=lc finetune=default",
    "compression=lc_budget compression.budget.ratio=0.3 cost=params decomposition=cheapest",
    "compression=direct rank=greedy_energy rank.ratio=0.5",
    "model=vgg16 data=cifar10 decomposition=tucker2 rank=rank_fraction rank.R_c=0.5 compression.S_D=300",
    "compression=none reference=none model.weights=somewhere.safetensors",
    "compression.method={conv1:svd,fc1:tucker2} compression.rank={fc1:{_target_:lowrank_pl.FixedRank,r:2}}",
    "compression=lc compression.most={conv1:8} compression.lambda_=1 compression.l_step_epochs=null "
    "compression.l_step_steps=10",
    "trainer.max_epochs=-1 trainer.max_steps=30 scheduler=constant trainer.gradient_clip_val=1",
    "trainer.max_epochs=null trainer.max_steps=30 +trainer.limit_train_batches=0.5 +trainer.limit_val_batches=2",
    "optimizer=adam +optimizer.betas=[0.8,0.9] +optimizer.eps=1e-6 optimizer.lr=1",
    "optimizer.momentum=0 optimizer.nesterov=false +optimizer.maximize=false",
    "scheduler=step_decay scheduler.milestones=[0.5,2] scheduler.gamma=0.5",
    "data.mean=[0.5] data.std=[1] data.size=null seed=4294967295",
    "checkpoint_every=1 label_smoothing=0 report_train=true channels_last=false product_decay=1e-4",
    "model=lenet5 +model.net.dropout=0 data=mnist trainer.precision=bf16-mixed trainer.deterministic=warn",
    "decomposition=tiled_svd decomposition.run=dense targets=convolutions targets.include=[a,b]",
    "debug=fast cost=latency paths.references=refs trainer.max_steps=5 +trainer.min_steps=5",
]


@pytest.mark.parametrize("words", RIGHT)
def test_what_is_right_passes(words: str) -> None:
    check_words(words.split(), "train")


def test_every_value_of_a_grid_is_tried() -> None:
    with pytest.raises(ValueError, match=r"Expected `optimizer\.lr` to be a number but got 'abc'"):
        check_words(["seed=0,1,2", "optimizer.lr=0.1,0.2,abc"], "train", several=True)


def test_arguments_that_are_passed_on_count() -> None:
    own, is_open = arguments(Digits)
    assert own["batch_size"] is int
    assert own["size"] == int | None
    assert not is_open
    assert {"root", "augment", "val_fraction"} <= arguments(CIFAR10)[0].keys()
    assert {"mu0", "steps", "penalty", "lambda_"} <= arguments(LearningCompression)[0].keys()
    assert not arguments(LearningCompression)[1]
    assert not arguments(Trainer)[1]
    assert arguments(WandbLogger)[1]  # Weights & Biases takes what it takes
    assert "params" in arguments(torch.optim.SGD)[0]


def test_runs_of_the_first_version_go_on() -> None:
    """Their configs have no `cost` and no `product_decay`."""
    text = """
    model: {net: {_target_: lowrank_pl.models.LeNet300}, weights: null}
    data: {_target_: lowrank_pl.data.Digits, batch_size: 128}
    compression: {}
    optimizer: {_target_: torch.optim.SGD, _partial_: true, lr: 1}
    scheduler: {_target_: lowrank_pl.schedules.cosine, _partial_: true}
    trainer: {_target_: pytorch_lightning.Trainer, max_epochs: 1, devices: 1}
    reference: {}
    finetune: {}
    logger: {}
    paths: {data: here, references: null}
    seed: 0
    channels_last: true
    label_smoothing: 0
    checkpoint_every: null
    report_train: false
    """
    check_config(OmegaConf.create(text))


def test_interrupted_while_it_starts(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from lowrank_pl.cli import main; main()", "train"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text())
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "Interrupted.\n")


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)
