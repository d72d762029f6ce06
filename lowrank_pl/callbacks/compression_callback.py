"""What every compressing callback shares: when it listens, plans, projects, swaps and saves."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
import torch

from lowrank_pl.adapters import obstacles
from lowrank_pl.callbacks.listener import Listener
from lowrank_pl.callbacks.quiet import batch_norms, check_copyable, recalibrate_batch_norms_
from lowrank_pl.callbacks.swap import Swap
from lowrank_pl.callbacks.training_metric import MetricChoice, MetricListener, TrainingMetric
from lowrank_pl.checks import check_int
from lowrank_pl.compression import Plan
from lowrank_pl.decompositions import Candidates, Choice, FirstOf
from lowrank_pl.methods import Distortion, distort_
from lowrank_pl.metric import Metric
from lowrank_pl.names import resolve
from lowrank_pl.planning import DEFAULT_RANK, MethodChoice, RankChoice, make_plan
from lowrank_pl.processes import equalize_
from lowrank_pl.ranks import RankRule
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import Trace

Occasion: TypeAlias = Literal["training", "evaluation", "end"]


class CompressionCallback(pl.Callback, ABC):
    """Weights are changed in place and modules never swapped; structures are known after the first batch, to which
    the callback listens. Layers that run or thaw later join then. Training ends with projected weights in memory, while
    checkpoints hold the training weights.
    """

    def __init__(
        self,
        method: MethodChoice,
        rank: RankChoice | None,
        targets: Targets | None,
        evaluate_distorted: bool,
        recalibrate_bn: int,
        batch_size: int | None = None,
        metric: MetricChoice = "weights",
    ) -> None:
        rank = DEFAULT_RANK if rank is None else rank
        resolve(method, Candidates, "method", FirstOf)  # type: ignore[type-abstract]
        resolve(rank, RankRule, "rank")  # type: ignore[type-abstract]
        if targets is not None and not isinstance(targets, Targets):
            raise TypeError(f"Expected argument `targets` to be a Targets but got {targets!r}")
        check_int("recalibrate_bn", recalibrate_bn, 0, "number of batches")
        if batch_size is not None:
            check_int("batch_size", batch_size, 1)
        self.method, self.rank, self.targets = method, rank, targets
        self.evaluate_distorted, self.recalibrate_bn = evaluate_distorted, recalibrate_bn
        self.plan: Plan | None = None
        self.distortion: Distortion | None = None  # the last one
        self.last_step = 0  # the optimizer step after which training was last acted on
        self._joined: set[str] = set()  # layers that take part, also where they are frozen later
        self._left: set[str] = set()  # layers that took no part in the version that wrote the checkpoint
        self._joins = True  # whether in that version layers could join later
        self._restored = False
        self._module: pl.LightningModule | None = None
        self.batch_size = batch_size
        self.metric = TrainingMetric.given_by(metric)
        self._listener, self._heard, self._swap = Listener(batch_size), MetricListener(self.metric), Swap()

    @abstractmethod
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Act, if it is time: the first batch has been heard and the plan is made."""

    @abstractmethod
    def project(self, trainer: pl.Trainer, plan: Plan, occasion: Occasion) -> Distortion:
        """Put the weights that would be deployed now in place of the training weights."""

    @abstractmethod
    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        """The plan has been made, for the first time since setup or with other targets than before."""

    @property
    def loaded_ranks(self) -> Collection[str] | None:
        """The layers that have ranks in a checkpoint that was loaded, until the plan has been made; None without."""
        return None

    @property
    def trace(self) -> Trace | None:
        """What the batches showed that were listened to."""
        return self._listener.trace

    def metrics(self, plan: Plan) -> dict[str, Metric] | None:
        """Of what the targets are given, as far as it has been heard; None where `metric` is `"weights"`."""
        return self._heard.metrics(plan)

    # -- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check_supported(trainer, type(self).__name__)
        if pl_module is not self._module:  # a plan holds the layers of one module
            self.plan, self._module = None, pl_module
            self._swap.unmark()
        if stage == "fit":
            self._swap.reopen()  # another fit goes on from the training weights
            self.plan = self.distortion = None
            self._listener, self._heard = Listener(self.batch_size), MetricListener(self.metric)
            self._restored = False
            self._joined, self._left, self._joins = set(), set(), True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        obstacles(pl_module)  # raises for adapters that do not write what they read
        for name in ("monitor_loss", "recalibrate_bn"):
            if getattr(self, name, False) and not pl_module.automatic_optimization:
                raise ValueError(
                    f"`{name}` calls training_step without training, which manual optimization does not allow: leave "
                    f"`{name}` out"
                )
            if getattr(self, name, False):
                check_copyable(pl_module, trainer, f"`{name}`", "leave it out")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._restored:
            self.last_step = trainer.global_step
            self._check_choices(pl_module)
        elif self.trace is not None:
            self._make_plan(trainer, pl_module)

    def _check_choices(self, pl_module: pl.LightningModule) -> None:
        """Raise for patterns that match nothing and for ranks that layers cannot have before a step has been made."""
        plan = make_plan(pl_module, self.method, self.rank, self.targets, training=True)
        for c in plan.compressions:
            c.rule.check(c.problem())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.plan is not None and self.plan.has_thawed():
            self._make_plan(trainer, pl_module)
        self._listener.start(pl_module, batch)
        self._heard.start(pl_module, self.plan, trainer.global_step, self._listener.is_listening)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.finish_listening(trainer, pl_module)
        if self.trace is not None:  # else `training_step` has skipped every batch
            self.after_step(trainer, pl_module, batch, batch_idx)

    def finish_listening(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A batch has run that was listened to: make the plan."""
        self._heard.stop()  # first: it began last, and both change how compiled code runs
        if self._listener.stop(pl_module):
            self._make_plan(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_last_batch:  # else `max_steps` has ended it in the middle, and a resumed run goes on listening
            self._listener.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._heard.give_up()
        self._listener.give_up()
        self._swap.end_evaluation()
        if isinstance(exception, KeyboardInterrupt) and self.trace is not None:
            self.close(trainer, pl_module)

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Plan:
        if self.plan is None:
            self._make_plan(trainer, pl_module)
        assert self.plan is not None
        return self.plan

    def _make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = None if self.plan is None else [c.name for c in self.plan.compressions]
        self.plan = make_plan(pl_module, self.method, self.rank, self.targets, self.trace, True, self._joined)
        if self.loaded_ranks is not None:
            self._meet_unknown(self.plan, self.loaded_ranks)
        self.plan.leave_dense(self._left, "dense before the fit went on from a checkpoint")
        self._joined |= {c.name for c in self.plan.compressions}
        self._heard.keep(self.plan)
        for c in self.plan.compressions:
            dtype = c.read().dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Layer {c.name!r}: expected float32 weights but got {dtype}, which rounds "
                    "the low rank away; train in mixed precision instead"
                )
        if before != [c.name for c in self.plan.compressions]:
            self.planned(trainer, self.plan)

    def _meet_unknown(self, plan: Plan, known: Collection[str]) -> None:
        """Layers that take part now, but in whose place a checkpoint has nothing: since then they have thawed, or this
        version supports more of them. They join; a run of a version in which no layer could goes on without them."""
        unknown = [c.name for c in plan.compressions if c.name not in known]
        for name in unknown:
            if name in self._joined:
                raise ValueError(
                    f"Layer {name!r} takes part now but has no rank in the checkpoint: expected one of the same "
                    "network, method and targets"
                )
        if unknown:
            self._left |= set() if self._joins else set(unknown)
            warnings.warn(
                f"{', '.join(unknown)} took no part when the checkpoint was written: "
                + ("they join now" if self._joins else "they stay dense, as an earlier version left them"),
                stacklevel=2,
            )

    # -- projected weights in place of training weights ------------------------------------------------------------

    def distort(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        occasion: Occasion = "training",
        choices: Mapping[str, Choice] | None = None,
    ) -> Distortion:
        """Project all targets in place, as these choices say or as the method does.

        The first process chooses, and all end with its very weights.
        """
        plan = self._plan(trainer, pl_module)
        with torch.inference_mode(False):
            plan.check_finite()  # on every process, so that all raise together
            given = None if choices is None else distort_(plan, choices, metrics=self.metrics(plan))
            distortion = given or self.project(trainer, plan, occasion)
            equalize_(plan.parameters)
        self.distortion = distortion
        self._swap.mark(plan)
        return distortion

    def is_projected(self) -> bool:
        """Whether the module holds the last projection, untouched."""
        return self.plan is not None and self._swap.is_marked(self.plan)

    def close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave projected weights in memory; does nothing if they are.

        Somebody who wrote to them since the last time (weight averaging, say) gets them projected as before.
        """
        if self._swap.is_closed:
            return
        again = self.distortion.choices if self._swap.was_closed and self.distortion is not None else None
        plan = self._plan(trainer, pl_module)
        buffers = [b for norm in batch_norms(pl_module) for b in norm.buffers()] if self.recalibrate_bn else []

        def project() -> None:
            if not self.is_projected():
                delta_w = self.distort(trainer, pl_module, "end", again).delta_w
                self.log_metrics(trainer, {"lowrank/delta_w": delta_w})
            if self.recalibrate_bn:
                recalibrate_batch_norms_(trainer, pl_module, self.recalibrate_bn)

        self._swap.close([*plan.parameters, *buffers], project)

    def training_weights(self) -> AbstractContextManager[None]:
        """After a fit: the undistorted training weights in place of the projected ones, for as long as it lasts."""
        return self._swap.training_weights()

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate_distorted and not trainer.sanity_checking and not self.is_projected():
            plan = self._plan(trainer, pl_module)
            self._swap.start_evaluation(plan, lambda: self.distort(trainer, pl_module, "evaluation"))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap.end_evaluation()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap.end_evaluation()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_evaluation(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap.end_evaluation()

    # -- checkpoints and logs --------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._swap.substitute(pl_module, checkpoint["state_dict"])

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step, "trace": self._listener.state_dict(), "joined": sorted(self._joined),
                "left": sorted(self._left), "moments": self._heard.state_dict()}  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.last_step, self._restored = state_dict["last_step"], True
        self._listener.load_state_dict(state_dict["trace"])
        self._heard.load_state_dict(state_dict.get("moments"))
        self._joins = "joined" in state_dict  # not before 0.2
        self._joined, self._left = set(state_dict.get("joined", ())), set(state_dict.get("left", ()))

    def log_metrics(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        """To the loggers directly: `pl_module.log` drops steps that `log_every_n_steps` does not divide, and raises
        when training has ended."""
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def rank_metrics(plan: Plan, choices: Mapping[str, Choice]) -> dict[str, float]:
    """The ranks for a logger, `lowrank/rank/LAYER`; that of a dense layer is its full rank."""
    values = {}
    for c in plan.compressions:
        own = choices[c.name].rank or c.full
        for i, r in enumerate(own):
            values[f"lowrank/rank/{c.name}" + (f"/{i}" if len(own) > 1 else "")] = float(r)
    return values


def _check_supported(trainer: pl.Trainer, name: str) -> None:
    # by name, since `lightning.pytorch` has classes of its own
    if _bases(trainer.strategy) & {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}:
        raise ValueError(
            f"{name} needs whole weights on every device, but {type(trainer.strategy).__name__} shards them: use "
            "strategy='ddp' or a single device"
        )
    others = [callback for callback in trainer.callbacks if isinstance(callback, CompressionCallback)]  # type: ignore[attr-defined]
    if len(others) > 1:
        names = " and ".join(type(other).__name__ for other in others)
        raise ValueError(
            f"Expected one compressing callback in a fit but got {names}: to treat layers differently, give one of "
            "them mappings from layers' names to methods and ranks"
        )
    if any("ModelPruning" in _bases(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} and ModelPruning cannot change the same weights in one fit: prune in a fit of its own, before or "
            "after"
        )
    if trainer.precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
        raise ValueError(
            f"{name} needs float32 weights, since rounding to {trainer.precision!r} undoes the low rank: use "
            f"precision='{str(trainer.precision).split('-')[0]}-mixed'"
        )


def _bases(thing: object) -> set[str]:
    return {kind.__name__ for kind in type(thing).mro()}
