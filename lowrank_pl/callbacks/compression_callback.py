"""What every compressing callback shares: life cycle, evaluation, checkpoints, processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lowrank_pl.callbacks.quiet import batch_norms, recalibrate_batch_norms_
from lowrank_pl.callbacks.stash import Stash, fingerprints
from lowrank_pl.choices import resolve
from lowrank_pl.compression import DEFAULT_RANK, Plan, make_plan
from lowrank_pl.decompositions import Decomposition, Rank
from lowrank_pl.methods import Distortion, distort_
from lowrank_pl.ranks import RankRule
from lowrank_pl.surgery import Recorder, Trace
from lowrank_pl.targets import Targets


class CompressionCallback(pl.Callback, ABC):
    """Weights are changed in place and modules never swapped; structures are known after the first batch, to which
    the callback listens. Training ends with projected weights in memory, while checkpoints hold the training weights.
    """

    def __init__(
        self, method: Any, rank: Any, targets: Targets | None, evaluate_distorted: bool, recalibrate_bn: int
    ) -> None:
        rank = DEFAULT_RANK if rank is None else rank
        resolve(method, Decomposition, "method")  # type: ignore[type-abstract]
        resolve(rank, RankRule, "rank")  # type: ignore[type-abstract]
        if targets is not None and not isinstance(targets, Targets):
            raise TypeError(f"Expected argument `targets` to be a Targets but got {targets!r}")
        if type(recalibrate_bn) is not int or recalibrate_bn < 0:
            raise ValueError(f"Expected argument `recalibrate_bn` to be a number of batches but got {recalibrate_bn!r}")
        self.method, self.rank, self.targets = method, rank, targets
        self.evaluate_distorted, self.recalibrate_bn = evaluate_distorted, recalibrate_bn
        self.plan: Plan | None = None
        self.trace: Trace | None = None
        self.distortion: Distortion | None = None  # the last one
        self.last_step = 0  # the optimizer step after which training was last acted on
        self._restored = False
        self._module: pl.LightningModule | None = None
        self._recorder: Recorder | None = None
        self._projected: list[tuple[int, int]] | None = None  # the weights' fingerprints right after a projection
        self._evaluating: Stash | None = None
        self._closed: Stash | None = None

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Act, if it is time: the first batch has been heard and the plan is made."""

    @abstractmethod
    def project(self, trainer: pl.Trainer, plan: Plan, closing: bool) -> Distortion:
        """Put the weights that would be deployed now in place of the training weights; `closing` at the end of a
        fit."""

    @abstractmethod
    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        """The plan has been made, for the first time since setup."""

    # -- life cycle ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check_supported(trainer, type(self).__name__)
        if pl_module is not self._module:  # a plan holds the layers of one module
            self.plan, self._projected, self._module = None, None, pl_module
        if stage == "fit":
            if self._closed is not None and self._closed.is_intact():
                self._closed.restore_()  # another fit goes on from the training weights
            self.plan = self.trace = self.distortion = self._projected = self._closed = None
            self._restored = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in ("monitor_loss", "recalibrate_bn"):
            if getattr(self, name, False) and not pl_module.automatic_optimization:
                raise ValueError(
                    f"`{name}` calls training_step without training, which manual optimization does not allow: leave "
                    f"`{name}` out"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._restored:
            self.last_step = trainer.global_step
        elif self.trace is not None:
            self._make_plan(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is None and (self.trace is None or not self.trace.samples):
            self._recorder = Recorder(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.finish_listening(trainer, pl_module)
        self.after_step(trainer, pl_module, batch, batch_idx)

    def finish_listening(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first batch has run: make the plan."""
        if self._recorder is not None:
            self.trace, self._recorder = self._recorder.stop(), None
            self._make_plan(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        self._end_evaluation()
        if isinstance(exception, KeyboardInterrupt) and self.trace is not None:
            self.close(trainer, pl_module)

    def close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave projected weights in memory; does nothing if they are.

        Somebody who wrote to them since the last time (weight averaging, say) gets them projected at the same ranks.
        """
        if self._closed is not None and self._closed.is_intact():
            return
        ranks = self.distortion.ranks if self._closed is not None and self.distortion is not None else None
        plan = self._plan(trainer, pl_module)
        buffers = [b for norm in batch_norms(pl_module) for b in norm.buffers()] if self.recalibrate_bn else []
        closed = Stash([*(c.parameter for c in plan.compressions), *buffers])
        if not self.is_projected():
            delta_w = self.distort(trainer, pl_module, ranks, closing=True).delta_w
            self.log_metrics(trainer, {"lowrank/delta_w": delta_w})
        if self.recalibrate_bn:
            recalibrate_batch_norms_(trainer, pl_module, self.recalibrate_bn)
        closed.seal()
        self._closed = closed

    def log_metrics(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """To the loggers directly: `pl_module.log` drops steps that `log_every_n_steps` does not divide, and raises
        when training has ended."""
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @contextmanager
    def training_weights(self) -> Iterator[None]:
        """After a fit: the undistorted training weights in place of the projected ones, for as long as it lasts."""
        assert self._closed is not None
        projected = Stash(self._closed.tensors)
        self._closed.restore_()
        try:
            yield
        finally:
            projected.restore_()
            self._closed.seal()

    # -- projection ------------------------------------------------------------------------------------------------

    def is_projected(self) -> bool:
        """Whether the module holds the last projection, untouched."""
        return self.plan is not None and self._projected == fingerprints(c.weight for c in self.plan.compressions)

    def distort(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        ranks: Mapping[str, Rank] | None = None,
        closing: bool = False,
    ) -> Distortion:
        """Project all targets in place, at these ranks or as the method does.

        The first process chooses, and all end with its very weights.
        """
        plan = self._plan(trainer, pl_module)
        with torch.inference_mode(False):
            plan.check_finite()  # on every process, so that all raise together
            distortion = self.project(trainer, plan, closing) if ranks is None else distort_(plan, ranks)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                for c in plan.compressions:
                    torch.distributed.broadcast(c.weight, src=0)
        self.distortion = distortion
        self._projected = fingerprints(c.weight for c in plan.compressions)
        return distortion

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        if self.plan is None:
            self._make_plan(trainer, pl_module)
        assert self.plan is not None
        return self.plan

    def _make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = self.plan is not None
        self.plan = make_plan(pl_module, self.method, self.rank, self.targets, self.trace, training=True)
        for c in self.plan.compressions:
            if c.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Layer {c.name!r}: expected float32 weights but got {c.weight.dtype}, which rounds "
                    "the low rank away; train in mixed precision instead"
                )
        if not known:
            self.planned(trainer, self.plan)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.evaluate_distorted or trainer.sanity_checking or self.is_projected():
            return
        plan = self._plan(trainer, pl_module)
        self._evaluating = Stash(c.parameter for c in plan.compressions)
        self.distort(trainer, pl_module)
        self._evaluating.seal()

    def _end_evaluation(self) -> None:
        if self._evaluating is not None:
            self._evaluating.restore_()
            self._evaluating = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for stash in (self._evaluating, self._closed):
            if stash is not None and stash.is_intact():
                stash.substitute(pl_module, checkpoint["state_dict"])

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step, "trace": None if self.trace is None else self.trace.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.last_step = state_dict["last_step"]
        self.trace = None if state_dict["trace"] is None else Trace.from_state_dict(state_dict["trace"])
        self._restored = True


def _check_supported(trainer: pl.Trainer, name: str) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"{name} needs whole weights on every device, but {type(trainer.strategy).__name__} shards them: use "
            "strategy='ddp' or a single device"
        )
    if trainer.precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"{name} needs float32 weights, since rounding to {trainer.precision!r} undoes the low rank: use "
            f"precision='{str(trainer.precision).split('-')[0]}-mixed'"
        )
