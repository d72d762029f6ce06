"""Learning-compression as a callback."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import pytorch_lightning as pl
from torch import nn
from typing_extensions import Unpack

from lowrank_pl.callbacks.alternating import AlternatingCallback
from lowrank_pl.callbacks.compression_callback import Occasion, rank_metrics
from lowrank_pl.callbacks.lc_settings import LCSettings, LStep, MuSchedule, schedule_and_l_step
from lowrank_pl.callbacks.lc_warnings import (
    lambda_in_words,
    warn_of_dense,
    warn_of_gap,
    warn_of_learning_rate,
    warn_of_zeros,
)
from lowrank_pl.callbacks.learning_rate import stiffest
from lowrank_pl.callbacks.training_metric import MetricChoice
from lowrank_pl.compression import Plan, write_weights_
from lowrank_pl.costs import Cost, Latency, resolve_cost
from lowrank_pl.decompositions import DENSE
from lowrank_pl.methods import CStep, Distortion, LCState, add_penalty_gradients_, c_step
from lowrank_pl.names import same_words
from lowrank_pl.planning import MethodChoice
from lowrank_pl.ranks import CostBudget, CostPenalty
from lowrank_pl.ranks.caps import Caps
from lowrank_pl.report import print_plan
from lowrank_pl.targets import Targets
from lowrank_pl.terminal import terminal


class LearningCompression(AlternatingCallback):
    """Learn weights and ranks together: minimize `loss + lambda sum_k ||W_k||^2 C_k(r_k)`, or the loss under a budget.

    Idelbayev & Carreira-Perpinan, Low-rank Compression of Neural Nets: Learning the Rank of Each Layer (CVPR 2020),
    Algorithm 1. L steps, the module's own training with the gradient of `mu/2 ||W - Theta - beta/mu||^2` added, take
    turns with C steps, which choose the rank of every layer and its Theta in closed form. Start from trained weights:
    the first act is a C step. After `steps` C steps, which are `(steps - 1) * l_step_epochs` epochs, the trainer is
    stopped with Theta in the module; extract it with `ExtractStructure` and train its factors for a while. A layer that
    first runs or thaws later joins at the next C step. Checkpoints hold the training weights and this callback's state,
    and a resumed run goes on as if it had not stopped.

    Args:
        lambda_: loss per million units of cost, times each layer's `||W||^2` (tens to hundreds) unless `normalize` is
            False; or else `budget`. What that amounts to is printed when the fit starts.
        budget: a `CostBudget`, such as `CostBudget("macs", 0.5)`, which has its own cost; lambda follows.
        method: a decomposition, its snake-case name, a mapping from name patterns to either, or `Cheapest(...)`.
        cost: `"macs"`, `"params"`, `"latency"`, or a function from a `LayerSpec` to a number.
        schedule: a `MuSchedule(mu0=..., growth=..., steps=...)`; or its fields here: `mu0`, `growth`, `steps` (C steps,
            the first included), `patience`, `tolerance`.
        l_step: an `LStep(epochs=...)`; or its fields here: `l_step_epochs` or `l_step_steps`, `penalty`, `lr_decay`,
            `restart_lr`, `clear_momentum`.
        most: the largest ranks, R_k in their equation 1: an int, or a mapping from name patterns to ints. A layer with
            a cap below its full rank may not stay dense. To a budget, caps are given with it: `CostBudget(most=...)`.
        normalize: multiply lambda by each layer's `||W||^2` at the start (the authors' code, for all but LeNet300).
            False: lambda is loss per million units of cost, the same for every layer.
        targets: which layers; default `Targets()`, all but the first convolution and the last linear layer.
        evaluate_distorted: validation, test and prediction see Theta.
        recalibrate_bn: re-estimate batch norm statistics over so many training batches at the end.
        batch_size: inputs in a batch, where its tensors do not tell (lists of images, sequence first); for costs and
            reports for one input.
        metric: in which sense all norms above are meant: `"weights"` (Frobenius), `"inputs"` (what the layer answers on
            what it is given in training), `"inputs_and_gradients"` (and as the loss's gradients weigh it), or a
            `TrainingMetric`; of mean eigenvalue 1, and the same from one C step to the next. The penalty is as stiff as
            the largest eigenvalue, often above 100, and asks for a smaller mu or learning rate where that is too stiff.
            Layers whose inputs nobody sees keep to Frobenius norm.

    Logs, under `lowrank/`, at every C step: `mu`, `gap`, `penalty`, `cost` (`lambda C(r)`), `lambda`,
    `lagrangian_before` and `lagrangian_after` (without the training loss, which a C step does not change), and
    `rank/LAYER`. A layer of rank 0 whose output goes into batch norm has no penalty while it has that rank;
    `unpenalized` counts such layers.
    """

    def __init__(  # noqa: PLR0913  # the problem, its schedule, and what every compression callback takes
        self,
        lambda_: float | None = None,
        budget: CostBudget | None = None,
        method: MethodChoice = "svd",
        cost: str | Cost = "macs",
        schedule: MuSchedule | None = None,
        l_step: LStep | None = None,
        normalize: bool = True,
        targets: Targets | None = None,
        evaluate_distorted: bool = True,
        recalibrate_bn: int = 0,
        most: Caps = None,
        batch_size: int | None = None,
        metric: MetricChoice = "weights",
        **settings: Unpack[LCSettings],
    ) -> None:
        if (lambda_ is None) == (budget is None):
            raise ValueError("Expected exactly one of the arguments `lambda_` and `budget`")
        if budget is not None and not isinstance(budget, CostBudget):
            raise TypeError(
                f"Expected argument `budget` to be a CostBudget such as CostBudget('macs', 0.5), not {budget!r}"
            )
        if budget is not None and cost != "macs" and resolve_cost(cost) != budget.charged:
            raise ValueError(f"Expected argument `cost` beside `lambda_` only: a budget has its own, {budget.cost!r}")
        if budget is not None and most is not None:
            raise ValueError(
                "Expected argument `most` beside `lambda_` only: a budget has its own, CostBudget(most=...)"
            )
        self.rule = CostPenalty(lambda_, cost, most) if budget is None else budget  # type: ignore[arg-type]
        super().__init__(method, self.rule, targets, evaluate_distorted, recalibrate_bn, batch_size, metric)
        self.schedule, self.l_step = schedule_and_l_step(schedule, l_step, settings)
        self.normalize = normalize
        self.state: LCState | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._warned = False

    # -- life cycle ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.state, self._loaded, self._warned = None, None, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.rule.charged, Latency):
            self.rule.charged.check()
        super().on_train_start(trainer, pl_module)

    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self._loaded is not None:
            self.state, self._loaded = LCState.from_dict(self._loaded, plan), None

    def add_gradients_(self, plan: Plan, only: Collection[nn.Parameter]) -> None:
        assert self.state is not None
        add_penalty_gradients_(plan, self.state, only)

    def project(self, trainer: pl.Trainer, plan: Plan, occasion: Occasion) -> Distortion:
        state = self.state
        if occasion == "end" and not self.finished:
            done = 0 if state is None else state.steps
            warnings.warn(
                f"Training ended after {done} of {self.schedule.steps} C steps; the last one follows now, at the mu "
                "reached",
                stacklevel=2,
            )
            if self.trace is not None:
                mu = self.schedule.mu0 if state is None else state.mu
                state, _ = self._next_state(trainer, plan, mu, mu)
        if state is None:  # nothing has been trained
            dense = dict.fromkeys((c.name for c in plan.compressions), DENSE)
            return Distortion(dense, plan.factor(dense), 0.0)
        choices, structures = state.completed(plan)
        return Distortion(choices, structures, write_weights_(plan, structures))

    # -- C steps ---------------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return self.schedule.steps

    def start(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self.state is None:
            lambda_ = self._c_step(trainer, plan).lambda_
            assert self.state is not None
            warn_of_zeros(plan, self.rule, self.state, self.schedule.mu0)
            if not self.finished:
                warn_of_dense(plan, self.rule, self.state, self.schedule.mu0, self.schedule.mu0)
            if trainer.is_global_zero:
                print_plan(plan.rows(self.state.choices), title="Low-rank structures after the first C step")
                unit = lambda_in_words(plan, self.rule.charged, lambda_, self.state.scales if self.normalize else None)
                terminal().print(unit, highlight=False)

    def alternate(self, trainer: pl.Trainer, plan: Plan) -> None:
        self._c_step(trainer, plan)

    def _c_step(self, trainer: pl.Trainer, plan: Plan) -> CStep:
        j = 0 if self.state is None else self.state.steps
        self.state, done = self._next_state(trainer, plan, self.schedule.mu(j), self.schedule.mu(j + 1))
        self.last_step, self.epochs = trainer.global_step, 0
        converged = self.state.unchanged >= self.schedule.patience and done.gap < self.schedule.tolerance
        self.finished = self.state.steps >= self.schedule.steps or converged
        self.log_metrics(trainer, self._metrics(plan, done, self.schedule.mu(j)))
        if self.finished:
            trainer.should_stop = True
            warn_of_dense(plan, self.rule, self.state, self.schedule.mu(j), self.schedule.mu0)
            warn_of_gap(done.gap)
            if trainer.is_global_zero and j > 0:
                print_plan(plan.rows(self.state.choices), title="Low-rank structures after the last C step")
            return done
        stiff = max([1.0, *(metric.largest for metric in self.state.metrics.values())])
        self._warned = self._warned or warn_of_learning_rate(trainer, "mu", self.state.mu, stiff)
        if j > 0:
            self.begin_l_step(trainer)
        return done

    def _next_state(self, trainer: pl.Trainer, plan: Plan, mu: float, next_mu: float) -> tuple[LCState, CStep]:
        metrics = self.metrics(plan)

        def step() -> tuple[LCState, CStep]:
            augmented = self.l_step.penalty == "augmented"
            return c_step(
                plan, self.rule, self.state, mu, next_mu, self.normalize, augmented, self._normed, metrics,
                stiffest(trainer, self.schedule.mu(self.schedule.steps - 1)),
            )  # fmt: skip

        return self.of_first_process(plan, step, LCState.from_dict)

    @property
    def _normed(self) -> list[str]:
        return [] if self.trace is None else self.trace.normed

    def _metrics(self, plan: Plan, done: CStep, mu: float) -> dict[str, float]:
        assert self.state is not None
        values = {
            "mu": mu,
            "gap": done.gap,
            "penalty": done.penalty,
            "cost": done.cost,
            "lambda": done.lambda_,
            "lagrangian_before": done.before,
            "lagrangian_after": done.after,
            "unpenalized": len(self.state.free),
        }
        logged = {f"lowrank/{name}": float(value) for name, value in values.items()}
        return {**logged, **rank_metrics(plan, self.state.choices)}

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = self._loaded if self.state is None or self.plan is None else self.state.to_dict(self.plan)
        return {**super().state_dict(), "lc": state, "asked": self._asked}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict["lc"]
        asked = state_dict.get("asked", self._asked)  # older checkpoints do not say
        if asked != self._asked:
            warnings.warn(f"The checkpoint was written with {asked}; it goes on with {self._asked}", stacklevel=2)

    @property
    def loaded_ranks(self) -> Collection[str] | None:
        return None if self._loaded is None else self._loaded["ranks"]

    @property
    def _asked(self) -> str:
        """The problem that is solved."""
        asked: dict[str, object] = {
            "rule": self.rule, "normalize": self.normalize, "penalty": self.l_step.penalty, "method": self.method
        }  # fmt: skip
        if self.metric is not None:  # older checkpoints do not say
            asked["metric"] = self.metric
        return same_words(", ".join(f"{name}={value!r}" for name, value in asked.items()))
