"""How many lines a training prints, and which."""

import re
from typing import Any

import pytest
import pytorch_lightning as pl
from nets import Module, loader

from lowrank_pl.runs.progress import EpochLines, Progress


def said(root: Any, capsys: pytest.CaptureFixture[str], **arguments: Any) -> list[str]:
    settings: dict[str, Any] = {"enable_progress_bar": False, "max_epochs": 25, **arguments}
    trainer = pl.Trainer(
        default_root_dir=root, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[EpochLines(Progress(), "training")], **settings,
    )  # fmt: skip
    trainer.fit(Module(), loader())
    lines = capsys.readouterr().out.splitlines()
    return [text for line in lines if (text := re.sub(r"^ +\d+ s  ", "", line)) != line]


def test_a_line_at_every_tenth(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]  # the first epochs at which 10 %, 20 %, ... are over
    assert said(tmp_path, capsys) == [f"training: epoch {epoch} of 25" for epoch in ends]


def test_short_trainings_and_trainings_by_steps(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(tmp_path, capsys, max_epochs=2) == ["training: epoch 1 of 2", "training: epoch 2 of 2"]
    steps = said(tmp_path, capsys, max_epochs=-1, max_steps=300)
    assert 1 <= len(steps) <= 10
    assert all(re.fullmatch(r"training: epoch \d+", line) for line in steps)


def test_none_beside_a_progress_bar(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(tmp_path, capsys, enable_progress_bar=True, max_epochs=3) == []
