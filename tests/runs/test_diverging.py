"""From which step on a loss is not finite."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_pl.runs import Diverged
from lowrank_pl.runs.diverging import FiniteLoss


def seen(*losses: float, check_after: int = 0) -> FiniteLoss:
    module: Any = None
    finite = FiniteLoss("training")
    for step, loss in enumerate(losses, 1):
        trainer: Any = SimpleNamespace(global_step=step)
        finite.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, step)
        if step == check_after:
            finite.check()
    return finite


def test_the_first_step_is_named() -> None:
    for losses in [(1.0, math.nan, math.nan), (1.0, math.inf, math.nan)]:
        with pytest.raises(Diverged, match="training diverged: the loss is not finite from step 2 on"):
            seen(*losses).check()


def test_a_loss_that_comes_back_is_no_divergence() -> None:
    seen(1.0, math.inf, 1.0).check()
    seen().check()


def test_losses_of_earlier_checks_are_forgotten() -> None:
    with pytest.raises(Diverged, match="step 3"):
        seen(1.0, 1.0, math.nan, check_after=2).check()
