"""Learning-compression as a callback."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch.optim import LBFGS, SGD, Optimizer

from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.callbacks.learning_rate import clear_momentum_, stability, start_l_step_
from lowrank_pl.compression import Plan, make_plan, write_weights_
from lowrank_pl.costs import Latency
from lowrank_pl.decompositions import Dense, chosen
from lowrank_pl.methods import CStep, Distortion, LCState, add_penalty_gradients_, c_step, least_mu
from lowrank_pl.ranks import CostBudget, CostPenalty
from lowrank_pl.report import print_plan
from lowrank_pl.targets import Targets


class LearningCompression(CompressionCallback):
    """Learn weights and ranks together: minimize `loss + lambda C(ranks)`, or the loss under a budget.

    Idelbayev & Carreira-Perpinan, Low-rank Compression of Neural Nets: Learning the Rank of Each Layer (CVPR 2020),
    Algorithm 1. L steps, the module's own training with the gradient of `mu/2 ||W - Theta - beta/mu||^2` added, take
    turns with C steps, which choose the rank of every layer and its Theta in closed form. Start from trained weights:
    the first act is a C step. After `steps` C steps, which are `(steps - 1) * l_step_epochs` epochs, the trainer is
    stopped with Theta in the module; extract it with `ExtractStructure` and train its factors for a while. Checkpoints
    hold the training weights and this callback's state, and a resumed run goes on as if it had not stopped.

    Args:
        lambda_: loss per million units of cost; or else `budget`.
        budget: a `CostBudget`, such as `CostBudget("macs", 0.5)`, which has its own cost; lambda follows.
        method: a decomposition, its snake-case name, a mapping from name patterns to either, or `Cheapest(...)`.
        cost: `"macs"`, `"params"`, `"latency"`, or a function from a `LayerSpec` to a number.
        mu0, growth: `mu = mu0 * growth^j` at C step j, counted from 0. A C step keeps what is worth `lambda / mu`:
            with a large mu0 the ranks of the first C step are near the final ones, and training has little say in
            them. Choose it so that the first ranks (`lowrank/rank/...`) are well below what you expect at the end.
            With a budget the first ranks meet it at any mu0, and few change later: to learn ranks, give a lambda.
        steps: C steps, the first included.
        l_step_epochs, l_step_steps: the length of an L step in epochs, or in optimizer steps.
        normalize: multiply lambda by each layer's `||W||^2` at the start (the authors' code, for all but LeNet300).
        penalty: `"augmented"`, or `"quadratic"`: without multipliers.
        targets: which layers; default `Targets()`, all but the first convolution and the last linear layer.
        patience, tolerance: also end when no rank has changed for so many C steps and `||W - Theta|| / ||W||` is below.
        clear_momentum: every L step starts with the optimizer's state empty.
        restart_lr: every L step starts at the initial learning rate, and its schedule anew.
        lr_decay: multiplies the (initial) learning rate at every L step: `lr * lr_decay^j`.
        evaluate_distorted: validation, test and prediction see Theta.
        recalibrate_bn: re-estimate batch norm statistics over so many training batches at the end.

    Logs, under `lowrank/`, at every C step: `mu`, `gap`, `penalty`, `cost` (`lambda C(r)`), `lambda`,
    `lagrangian_before` and `lagrangian_after` (without the training loss, which a C step does not change), and
    `rank/LAYER`. A layer of rank 0 whose output goes into batch norm has no penalty while it has that rank;
    `unpenalized` counts such layers.
    """

    def __init__(
        self,
        lambda_: float | None = None,
        budget: CostBudget | None = None,
        method: Any = "svd",
        cost: Any = "macs",
        mu0: float = 1e-3,
        growth: float = 1.2,
        steps: int = 40,
        l_step_epochs: int | None = None,
        l_step_steps: int | None = None,
        normalize: bool = True,
        penalty: str = "augmented",
        targets: Targets | None = None,
        patience: int = 5,
        tolerance: float = 1e-3,
        clear_momentum: bool = False,
        restart_lr: bool = False,
        lr_decay: float = 1.0,
        evaluate_distorted: bool = True,
        recalibrate_bn: int = 0,
    ) -> None:
        if (lambda_ is None) == (budget is None):
            raise ValueError("Expected exactly one of the arguments `lambda_` and `budget`")
        if (l_step_epochs is None) == (l_step_steps is None):
            raise ValueError("Expected exactly one of the arguments `l_step_epochs` and `l_step_steps`")
        if budget is not None and not isinstance(budget, CostBudget):
            raise TypeError(
                f"Expected argument `budget` to be a CostBudget such as CostBudget('macs', 0.5), not {budget!r}"
            )
        if penalty not in ("augmented", "quadratic"):
            raise ValueError(f"Expected argument `penalty` to be 'augmented' or 'quadratic' but got {penalty!r}")
        counts = {"steps": steps, "patience": patience, "l_step_epochs": l_step_epochs, "l_step_steps": l_step_steps}
        for name, count in counts.items():
            _check_count(name, count)
        for name, value, above in (("mu0", mu0, 0.0), ("growth", growth, 1.0), ("lr_decay", lr_decay, 0.0)):
            _check_number(name, value, above)
        self.rule = CostPenalty(lambda_, cost) if budget is None else budget  # type: ignore[arg-type]
        super().__init__(method, self.rule, targets, evaluate_distorted, recalibrate_bn)
        self.mu0, self.growth, self.steps = mu0, growth, steps
        self.l_step_epochs, self.l_step_steps = l_step_epochs, l_step_steps
        self.normalize, self.penalty = normalize, penalty
        self.patience, self.tolerance = patience, tolerance
        self.clear_momentum, self.restart_lr, self.lr_decay = clear_momentum, restart_lr, lr_decay
        self.state: LCState | None = None
        self.epochs = 0  # of the current L step
        self.finished = False
        self._loaded: Mapping[str, Any] | None = None
        self._warned = False

    # -- life cycle ------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.state, self.epochs, self.finished, self._loaded, self._warned = None, 0, False, None, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_optimizers(trainer)
        self._check_targets(trainer, pl_module)
        if isinstance(self.rule.cost, Latency):
            self.rule.cost.check()
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.finished

    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self._loaded is not None:
            self.state, self._loaded = LCState.from_dict(self._loaded, plan), None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if pl_module.automatic_optimization:  # else this may be the first of several steps on the first batch
            self.finish_listening(trainer, pl_module)
        if self.plan is None or self.trace is None:
            return
        self._start(trainer, self.plan)
        assert self.state is not None
        add_penalty_gradients_(self.plan, self.state, [p for group in optimizer.param_groups for p in group["params"]])

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.plan is not None
        self._start(trainer, self.plan)
        self.epochs += int(trainer.is_last_batch)
        if self.l_step_epochs is not None:
            due = self.epochs >= self.l_step_epochs
        else:
            assert self.l_step_steps is not None
            due = trainer.global_step - self.last_step >= self.l_step_steps
        if due and not self.finished:
            self._c_step(trainer, self.plan)

    def project(self, trainer: pl.Trainer, plan: Plan, closing: bool) -> Distortion:
        state = self.state
        if closing and not self.finished:
            done = 0 if state is None else state.steps
            warnings.warn(
                f"Training ended after {done} of {self.steps} C steps; the last one follows now, at the mu reached",
                stacklevel=2,
            )
            if self.trace is not None:
                mu = self.mu0 if state is None else state.mu
                state, _ = c_step(plan, self.rule, state, mu, mu, self.normalize, normed=self._normed)
        if state is None:  # nothing has been trained
            return Distortion(
                {},
                {c.name: Dense(c.layer, c.decomposition.full_rank(c.layer), c.weight) for c in plan.compressions},
                0.0,
            )
        return Distortion(state.ranks, state.structures, write_weights_(plan, state.structures))

    # -- C steps ---------------------------------------------------------------------------------------------------

    def _start(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self.state is None:
            self._c_step(trainer, plan)
            self._warn_of_zeros(plan)
            if trainer.is_global_zero:
                print_plan(plan.rows(self.state.ranks))  # type: ignore[attr-defined]

    def _c_step(self, trainer: pl.Trainer, plan: Plan) -> None:
        j = 0 if self.state is None else self.state.steps
        self.state, done = c_step(
            plan,
            self.rule,
            self.state,
            mu=self.mu0 * self.growth**j,
            next_mu=self.mu0 * self.growth ** (j + 1),
            normalize=self.normalize,
            augmented=self.penalty == "augmented",
            normed=self._normed,
        )
        self.last_step, self.epochs = trainer.global_step, 0
        converged = self.state.unchanged >= self.patience and done.gap < self.tolerance
        self.finished = self.state.steps >= self.steps or converged
        self.log_metrics(trainer, self._metrics(plan, done, self.mu0 * self.growth**j))
        if self.finished:
            trainer.should_stop = True
            return
        self._warn_of_learning_rate(trainer)
        if j > 0:
            start_l_step_(trainer, self.lr_decay, self.restart_lr)
            if self.clear_momentum:
                clear_momentum_(trainer)

    @property
    def length(self) -> dict[str, int]:
        """How long the trainer takes for all C steps: its `max_epochs` or `max_steps`."""
        if self.l_step_epochs is not None:
            return {"max_epochs": max((self.steps - 1) * self.l_step_epochs, 1)}
        assert self.l_step_steps is not None
        return {"max_epochs": -1, "max_steps": max((self.steps - 1) * self.l_step_steps, 1)}

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
        for c in plan.compressions:
            own = chosen(c.decomposition, self.state.ranks[c.name])[1]
            for i, r in enumerate(own):
                values[f"rank/{c.name}" + (f"/{i}" if len(own) > 1 else "")] = r
        return {f"lowrank/{name}": float(value) for name, value in values.items()}

    # -- what may be wrong -----------------------------------------------------------------------------------------

    def _check_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = make_plan(pl_module, self.method, self.rule, self.targets, training=True)
        optimized = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for name, reason in plan.dense.items():
            if reason.startswith("frozen"):
                raise ValueError(
                    f"Layer {name!r} is {reason}: expected weights that are trained. Unfreeze it, or leave it out by "
                    "Targets(exclude=[...])"
                )
        for c in plan.compressions:
            if id(c.parameter) not in optimized:
                raise ValueError(
                    f"Layer {c.name!r}: expected its weight among the optimizer's parameters, but no optimizer has it. "
                    "Add it there, or leave the layer out by Targets(exclude=[...])"
                )

    def _warn_of_zeros(self, plan: Plan) -> None:
        assert self.state is not None
        ranks = self.state.ranks
        zero = [c for c in plan.compressions if not any(ranks[c.name])]
        factorized = [c for c in plan.compressions if any(ranks[c.name]) and c.is_cheaper(ranks[c.name])]
        if factorized or not zero or not isinstance(self.rule, CostPenalty):
            return
        some, every = least_mu(Plan(zero, {}, {}), self.rule, self.state.scales)
        but = "" if len(zero) == len(plan.compressions) else " that does not stay dense"
        warnings.warn(
            f"Every layer{but} has rank 0 at mu0 = {self.mu0:g}: lambda_ = {self.rule.lambda_:g} outweighs all "
            f"weights. With mu0 above {some:.2g} at least one layer has not, with mu0 above {every:.2g} none has",
            stacklevel=2,
        )

    def _warn_of_learning_rate(self, trainer: pl.Trainer) -> None:
        assert self.state is not None
        ratio = max((stability(o, self.state.mu) for o in trainer.optimizers if isinstance(o, SGD)), default=0.0)
        if ratio > 0.8 and not self._warned:
            self._warned = True
            warnings.warn(
                f"The learning rate times mu = {self.state.mu:.3g} is {ratio:.2f} of what gradient descent on the "
                "penalty is stable at: lower the learning rate (`lr_decay`), `growth` or `steps`",
                stacklevel=2,
            )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = self._loaded if self.state is None else self.state.to_dict()
        return {**super().state_dict(), "lc": state, "epochs": self.epochs, "finished": self.finished}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded, self.epochs, self.finished = state_dict["lc"], state_dict["epochs"], state_dict["finished"]


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"Expected argument `{name}` to be an int of at least 1 but got {value!r}")


def _check_number(name: str, value: float, above: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < float("inf"):
        raise ValueError(f"Expected argument `{name}` to be a number above {above:g} but got {value!r}")


def _check_optimizers(trainer: pl.Trainer) -> None:
    for optimizer in trainer.optimizers:
        if isinstance(getattr(optimizer, "optimizer", optimizer), LBFGS):
            raise ValueError(
                "LearningCompression adds the penalty to gradients, but LBFGS evaluates the loss by itself: expected "
                "an optimizer that takes one step per gradient, such as SGD or Adam"
            )
        if trainer.precision == "16-mixed" and any(group.get("fused") for group in optimizer.param_groups):
            raise ValueError(
                "A fused optimizer under precision='16-mixed' unscales gradients after the penalty has been added: "
                "expected `fused=False`, or precision='bf16-mixed'"
            )
