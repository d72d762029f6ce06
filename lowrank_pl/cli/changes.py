"""What changed values mean for a run that goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lowrank_pl.cli.configs import mirrors, protected
from lowrank_pl.runs import Run, checkpoints, stages_again


def show(changed: Mapping[str, tuple[Any, Any]], directory: Path, force: bool, config: DictConfig) -> list[str]:
    """Print what is changed, and return it; `ValueError` for what makes it another run."""
    notes = _out_of_reach(changed, directory) | without_effect(changed, config)
    lines = [
        f"{key}: {old} -> {new}" + (f"  ({notes[key]})" if key in notes else "") for key, (old, new) in changed.items()
    ]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if protected(changed) and not force:
        raise ValueError(
            f"{', '.join(protected(changed))}: the model, data, method and seed make the run what it is. Start another "
            "run, or add --force"
        )
    return lines


def given_keys(words: Iterable[str], linked: dict[str, str]) -> set[str]:
    """The keys that stand on the command line, and what repeats them."""
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    return {each for key in keys for each in (key, *mirrors(key, linked))}


def is_at_its_end(run: Run, force: bool) -> bool:
    """Whether there is nothing to do for an unchanged run; `ValueError` for one that has diverged, unless `force`."""
    if run.facts["status"] == "diverged" and not force:
        raise ValueError(
            f"{run.directory} has diverged, and would do so again ({run.facts.get('error', '')}). Change values, or "
            "add --force"
        )
    again, _ = stages_again(run.directory, run.facts["done"])
    return run.facts["status"] == "finished" and not again


def without_effect(keys: Iterable[str], config: DictConfig) -> dict[str, str]:
    """What to say of the trainer's length where the method has its own."""
    method = str(config.compression.get("_target_", ""))
    if not method.endswith((".LearningCompression", ".ADMM")):
        return {}
    reason = "has no effect: compression.steps and compression.l_step_epochs say how long it trains"
    return {key: reason for key in keys if key in ("trainer.max_epochs", "trainer.max_steps")}


def still_done(done: list[str], changed: Iterable[str]) -> list[str]:
    """The stages that a change leaves as they are."""
    parts = {key.partition(".")[0] for key in changed} - {"report_train", "logger"}
    return [stage for stage in done if not parts or (stage == "fit" and parts == {"finetune"})]


def _out_of_reach(changed: Iterable[str], directory: Path) -> dict[str, str]:
    """What to say beside a key whose old value lives in the run's files."""
    notes = {}
    for key in changed:
        stage = {"finetune": directory / "finetune", "reference": directory / "reference"}.get(key.partition(".")[0])
        started = bool(checkpoints((stage or directory) / "checkpoints"))
        if key.startswith("reference.") and (directory / "reference.safetensors").is_file():
            notes[key] = "has no effect: the reference is trained"
        elif key == "model.weights" and started:
            notes[key] = "has no effect: weights are in the checkpoint"
        elif started and re.search(r"(^|\.)optimizer\.(_target_|amsgrad|centered)$", key):
            raise ValueError(f"`{key}`: the checkpoint has the state of another optimizer. Start another run")
        elif started and re.search(r"(^|\.)optimizer\.", key):
            notes[key] = "from the checkpoint on"
        elif started and key.startswith("finetune.phases."):
            notes[key] = "holds from the checkpoint on, as if it had been so from the start"
        elif started and (key.startswith("scheduler.") or ".scheduler." in key or key in _LENGTHS):
            notes[key] = "the schedule goes on as if it had been so from the start"
    return notes


_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "finetune.epochs")
