"""Runs: their directories, what happens in them, and how they are taken up again."""

from lowrank_pl.runs.directory import Run, check_stored
from lowrank_pl.runs.diverging import Diverged
from lowrank_pl.runs.execute import execute
from lowrank_pl.runs.one_shot import OneShot
from lowrank_pl.runs.recipe import Phase, Recipe, Training
from lowrank_pl.runs.resumable import checkpoints
from lowrank_pl.runs.state import stages_again
from lowrank_pl.runs.stopping import Interrupted, Stop

__all__ = [
    "Diverged",
    "Interrupted",
    "OneShot",
    "Phase",
    "Recipe",
    "Run",
    "Stop",
    "Training",
    "check_stored",
    "checkpoints",
    "execute",
    "stages_again",
]
