"""Which changes a resumed run does not see, because their old values live in its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lowrank_pl.runs import checkpoints


def out_of_reach(changed: Iterable[str], directory: Path) -> dict[str, str]:
    """What to say beside a changed key."""
    notes = {}
    for key in changed:
        stage = {"finetune": directory / "finetune", "reference": directory / "reference"}.get(key.partition(".")[0])
        started = bool(checkpoints((stage or directory) / "checkpoints"))
        if key.startswith("reference.") and (directory / "reference.safetensors").is_file():
            notes[key] = "has no effect: the reference is trained"
        elif key == "model.weights" and started:
            notes[key] = "has no effect: weights are in the checkpoint"
        elif started and (key.startswith("optimizer.") or ".optimizer." in key):
            notes[key] = "has no effect: the optimizer's settings are in the checkpoint"
        elif started and (key.startswith("scheduler.") or ".scheduler." in key or key in _LENGTHS):
            notes[key] = "the schedule goes on as if it had been so from the start"
    return notes


_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "finetune.epochs")
