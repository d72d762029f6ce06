"""ADMM as a callback."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lowrank_pl.callbacks.alternating import AlternatingCallback
from lowrank_pl.callbacks.compression_callback import Occasion
from lowrank_pl.callbacks.lc_settings import LStep
from lowrank_pl.callbacks.lc_warnings import FAR, warn_of_learning_rate
from lowrank_pl.callbacks.training_metric import MetricChoice
from lowrank_pl.checks import check_int, check_number
from lowrank_pl.compression import Plan, write_weights_
from lowrank_pl.decompositions import DENSE, LowRankPlusColumns
from lowrank_pl.methods import Distortion, Splits, SplitStep, add_split_gradients_, choices_of, deployed, split_step
from lowrank_pl.names import same_words
from lowrank_pl.ranks import CostPenalty
from lowrank_pl.report import print_plan
from lowrank_pl.targets import Targets


class ADMM(AlternatingCallback):
    """Learn weights that are whole input channels plus low rank: minimize `loss + sum_k lambda_1 ||A_k||_{2,1} +
    lambda_2 ||B_k||_*`, subject to `W_k = A_k + B_k`; how many channels and which rank follows.

    C. Yu, Low Rank Approximation (lecture, 2021), "Unified framework", with the network's own loss in place of each
    layer's response. L steps, the module's own training with the gradient of `t/2 ||W - A - B - Lambda/t||^2` added,
    take turns with proximal steps: A loses the input channels (with all kernel places) whose norm is small, B its small
    singular values, and Lambda moves by `t (A + B - W)`. Start from trained weights: the first act is a proximal step.
    After `steps` of them, which are `(steps - 1) * l_step_epochs` epochs, the trainer is stopped with the nearest
    weights of that structure in the module (`LowRankPlusColumns`); extract it with `ExtractStructure` and train its
    factors for a while. Checkpoints hold the training weights and this callback's state, and a resumed run goes on as
    if it had not stopped.

    Args:
        lambda_1: for its own weight as it is at the start, as A, a layer pays `lambda_1 ||W||^2` in loss. So at the
            first step channels smaller than `lambda_1 / t0` of the mean one vanish, and weights are pulled towards 0 at
            most at about the rate of a weight decay of `lambda_1`, the same in every layer. For something to happen,
            `lambda_1` times learning rate (over 1 - momentum) times optimizer steps must come to about 1.
        lambda_2: the same for B and its singular values.
        t0: the weight t of the penalty at the first step, as LC's mu: learning rate times t must be below 1 or so.
        growth: t is multiplied by it at every proximal step. Above 1 A and B come near to the weights sooner, and have
            fewer zeros.
        balance: in place of that, t is doubled or halved, layer by layer, where one of the residuals is ten times the
            other (Boyd et al., 2011, 3.4.1).
        steps: proximal steps, the first one included.
        tolerance: it ends before when both residuals are below this, and no rank has changed for `patience` steps.
        l_step_epochs, l_step_steps: the training between two proximal steps; exactly one of them. Or all of an L step
            as `l_step`, an `LStep(epochs=..., lr_decay=..., restart_lr=..., clear_momentum=...)`.
        targets: which layers; default `Targets()`, all but the first convolution and the last linear layer.
        evaluate_distorted: validation, test and prediction see what would be deployed.
        recalibrate_bn: re-estimate batch norm statistics over so many training batches at the end.
        batch_size: inputs in a batch, where its tensors do not tell.
        metric: in which sense what is deployed is nearest to the weights, as for `DeepTwist`.

    Logs, under `lowrank/`, at every proximal step: `primal` and `dual`, the largest relative residuals of all layers,
    `t` (the largest), `penalty` (in loss), and for every layer `rank/LAYER/0`, the rank of B, and `rank/LAYER/1`, the
    channels of A.
    """

    def __init__(  # noqa: PLR0913  # the problem, its schedule, and what every compression callback takes
        self,
        lambda_1: float,
        lambda_2: float,
        t0: float = 0.1,
        growth: float = 1.0,
        balance: bool = False,
        steps: int = 40,
        patience: int = 5,
        tolerance: float = 1e-3,
        l_step_epochs: int | None = None,
        l_step_steps: int | None = None,
        l_step: LStep | None = None,
        targets: Targets | None = None,
        evaluate_distorted: bool = True,
        recalibrate_bn: int = 0,
        batch_size: int | None = None,
        metric: MetricChoice = "weights",
    ) -> None:
        for name, value in (("lambda_1", lambda_1), ("lambda_2", lambda_2), ("t0", t0)):
            check_number(name, value, lambda x: 0 < x < float("inf"), "a number above 0")
        check_number("growth", growth, lambda x: 1 <= x < float("inf"), "a number of at least 1")
        check_number("tolerance", tolerance, lambda x: 0 <= x < float("inf"), "a number of at least 0")
        if balance and growth != 1:
            raise ValueError(f"Expected argument `growth` to be 1 with balance=True, which sets t, but got {growth!r}")
        check_int("steps", steps, 1)
        check_int("patience", patience, 1)
        if l_step is not None and (l_step_epochs is not None or l_step_steps is not None):
            raise ValueError("Expected argument `l_step`, or `l_step_epochs` or `l_step_steps`, but got several")
        if l_step is not None and l_step.penalty != "augmented":
            raise ValueError(f"Expected argument `l_step` with penalty='augmented' but got {l_step!r}")
        # nobody asks the rule: the lambdas choose
        super().__init__(
            LowRankPlusColumns(), CostPenalty(0.0, "params"), targets, evaluate_distorted, recalibrate_bn, batch_size,
            metric,
        )  # fmt: skip
        self.lambda_1, self.lambda_2, self.t0, self.growth, self.balance = lambda_1, lambda_2, t0, growth, balance
        self.steps, self.patience, self.tolerance = steps, patience, tolerance
        self.l_step = l_step or LStep(l_step_epochs, l_step_steps)
        self.state: Splits | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._warned = False

    @property
    def num_steps(self) -> int:
        return self.steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.state, self._loaded, self._warned = None, None, False

    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self._loaded is not None:
            self.state, self._loaded = Splits.from_dict(self._loaded, plan), None

    def start(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self.state is None:
            self._step(trainer, plan)
            assert self.state is not None
            if trainer.is_global_zero:
                print_plan(plan.rows(choices_of(plan, self.state)), title="A + B after the first proximal step")

    def add_gradients_(self, plan: Plan, only: Collection[nn.Parameter]) -> None:
        assert self.state is not None
        add_split_gradients_(plan, self.state, only)

    def alternate(self, trainer: pl.Trainer, plan: Plan) -> None:
        done = self._step(trainer, plan)
        assert self.state is not None
        if not self.finished:
            self.begin_l_step(trainer)
            return
        trainer.should_stop = True
        if done.residuals.primal > FAR:
            warnings.warn(
                f"ADMM has ended with ||W - A - B|| / ||W|| = {done.residuals.primal:.2g} in one of the layers: what "
                f"is deployed is far from what was trained. Expected below {FAR:g}; take more proximal steps, a larger "
                "growth or t0, or longer L steps",
                stacklevel=2,
            )
        choices = choices_of(plan, self.state)
        if all(c.settled(choices[c.name]) == DENSE for c in plan.compressions):
            warnings.warn(
                f"ADMM has ended with every layer dense: too few channels and singular values have vanished with "
                f"lambda_1={self.lambda_1:g} and lambda_2={self.lambda_2:g}. Expected lambdas that times the learning "
                f"rate / (1 - momentum) times optimizer steps ({trainer.global_step:,} here) come to about 1",
                stacklevel=2,
            )
        if trainer.is_global_zero:
            print_plan(plan.rows(choices), title="A + B after the last proximal step")

    def project(self, trainer: pl.Trainer, plan: Plan, occasion: Occasion) -> Distortion:
        if occasion == "end" and not self.finished:
            done = 0 if self.state is None else self.state.steps
            warnings.warn(f"Training ended after {done} of {self.steps} proximal steps", stacklevel=2)
        if self.state is None:  # nothing has been trained
            dense = dict.fromkeys((c.name for c in plan.compressions), DENSE)
            return Distortion(dense, plan.factor(dense), 0.0)
        choices, structures = deployed(plan, self.state, self.metrics(plan))
        return Distortion(choices, structures, write_weights_(plan, structures))

    def _step(self, trainer: pl.Trainer, plan: Plan) -> SplitStep:
        def step() -> tuple[Splits, SplitStep]:
            return split_step(
                plan, self.state, self.lambda_1, self.lambda_2, self.t0, self.growth, self.balance
            )  # fmt: skip

        self.state, done = self.of_first_process(plan, step, Splits.from_dict)
        self.last_step, self.epochs = trainer.global_step, 0
        settled = done.residuals.largest < self.tolerance and self.state.unchanged >= self.patience
        self.finished = self.state.steps >= self.steps or settled
        t = max((layer.t for layer in self.state.layers.values()), default=self.t0)
        self._warned = self._warned or warn_of_learning_rate(trainer, "t", t)
        self.log_metrics(trainer, self._metrics(done, t))
        return done

    def _metrics(self, done: SplitStep, t: float) -> dict[str, float]:
        assert self.state is not None
        values = {"t": t, "penalty": done.penalty}
        if self.state.steps > 1:
            values |= {"primal": done.residuals.primal, "dual": done.residuals.dual}
        for name, sizes in self.state.sizes().items():
            values |= {f"rank/{name}/{i}": size for i, size in enumerate(sizes)}
        return {f"lowrank/{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        state = self._loaded if self.state is None or self.plan is None else self.state.to_dict(self.plan)
        return {**super().state_dict(), "admm": state, "asked": self._asked}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict["admm"]
        if state_dict["asked"] != self._asked:
            warnings.warn(
                f"The checkpoint was written with {state_dict['asked']}; it goes on with the norms of that, and with "
                f"{self._asked}",
                stacklevel=2,
            )

    @property
    def loaded_ranks(self) -> Collection[str] | None:
        return None if self._loaded is None else self._loaded["ranks"]

    @property
    def _asked(self) -> str:
        """The problem that is solved."""
        words = f"lambda_1={self.lambda_1!r}, lambda_2={self.lambda_2!r}"
        return same_words(words if self.metric is None else f"{words}, metric={self.metric!r}")
