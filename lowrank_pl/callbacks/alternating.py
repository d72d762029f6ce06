"""What methods share that take turns: L steps, training with a penalty, and steps on what it draws weights to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import nn
from torch.optim import Optimizer

from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.callbacks.lc_settings import LStep
from lowrank_pl.callbacks.lc_warnings import check_optimizers, check_targets
from lowrank_pl.callbacks.learning_rate import clear_momentum_, start_l_step_
from lowrank_pl.compression import Plan
from lowrank_pl.planning import make_plan
from lowrank_pl.processes import from_first, is_parallel


class _State(Protocol):
    def to_dict(self, plan: Plan) -> dict[str, Any]: ...


S = TypeVar("S", bound=_State)
Done = TypeVar("Done")


class AlternatingCallback(CompressionCallback):
    """The first act is a step on what the weights are drawn to; then, after every L step, comes another one, until
    `num_steps` have been made and the trainer is stopped."""

    l_step: LStep
    epochs = 0  # of the current L step
    finished = False

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many steps there are, the first one included."""

    @abstractmethod
    def start(self, trainer: pl.Trainer, plan: Plan) -> None:
        """Make the first step, unless it has been made."""

    @abstractmethod
    def alternate(self, trainer: pl.Trainer, plan: Plan) -> None:
        """Make another step, and begin another L step unless it was the last one."""

    @abstractmethod
    def add_gradients_(self, plan: Plan, only: Collection[nn.Parameter]) -> None:
        """Add those of the penalty to the gradients of these parameters."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.epochs, self.finished = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_optimizers(trainer, type(self).__name__)
        check_targets(trainer, make_plan(pl_module, self.method, self.rank, self.targets, training=True))
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.finished

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.automatic_optimization:  # else this may be the first of several steps on the first batch
            self.finish_listening(trainer, pl_module)
        if self.plan is None or self.trace is None:
            return
        self.start(trainer, self.plan)
        self.add_gradients_(self.plan, [p for group in optimizer.param_groups for p in group["params"]])

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.plan is not None
        self.start(trainer, self.plan)
        self.epochs += int(trainer.is_last_batch)
        if self.l_step.epochs is not None:
            due = self.epochs >= self.l_step.epochs
        else:
            assert self.l_step.steps is not None
            due = trainer.global_step - self.last_step >= self.l_step.steps
        if due and not self.finished:
            self.alternate(trainer, self.plan)

    def begin_l_step(self, trainer: pl.Trainer) -> None:
        """Optimizers and their schedules as `l_step` says."""
        start_l_step_(trainer, self.l_step.lr_decay, self.l_step.restart_lr)
        if self.l_step.clear_momentum:
            clear_momentum_(trainer)

    def of_first_process(
        self, plan: Plan, step: Callable[[], tuple[S, Done]], read: Callable[[Mapping[str, Any], Plan], S]
    ) -> tuple[S, Done]:
        """The first process makes the step, the others receive what came out."""
        if not is_parallel():
            return step()
        plan.check_finite()  # before: so that all raise together

        def plain() -> tuple[Any, Done]:
            state, done = step()
            return move_data_to_device(state.to_dict(plan), torch.device("cpu")), done

        values, done = from_first(plain)
        return read(values, plan), done

    @property
    def length(self) -> dict[str, int]:
        """How long the trainer takes for all steps: its `max_epochs` or `max_steps`."""
        if self.l_step.epochs is not None:
            return {"max_epochs": max((self.num_steps - 1) * self.l_step.epochs, 1)}
        assert self.l_step.steps is not None
        return {"max_epochs": -1, "max_steps": max((self.num_steps - 1) * self.l_step.steps, 1)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epochs": self.epochs, "finished": self.finished}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.epochs, self.finished = state_dict["epochs"], state_dict["finished"]
