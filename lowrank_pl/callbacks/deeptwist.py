"""DeepTwist as a callback."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import pytorch_lightning as pl

from lowrank_pl.callbacks.compression_callback import CompressionCallback, Occasion, rank_metrics
from lowrank_pl.callbacks.quiet import quiet_copy, training_loss
from lowrank_pl.callbacks.training_metric import MetricChoice
from lowrank_pl.checks import check_int
from lowrank_pl.compression import Plan
from lowrank_pl.decompositions import Choice
from lowrank_pl.methods import Distortion, distort_, is_due
from lowrank_pl.names import same_words
from lowrank_pl.planning import MethodChoice, RankChoice
from lowrank_pl.processes import from_first
from lowrank_pl.ranks import RankProblem
from lowrank_pl.report import print_plan
from lowrank_pl.targets import Targets


class DeepTwist(CompressionCallback):
    """After every `S_D` optimizer steps, replace each target weight by its low-rank projection, and train on.

    Lee, Kwon, Kim & Wei, Learning Low-Rank Approximation for CNNs (2019); there S_D is 100 to 5000. Training always
    ends on a distortion, whatever ended it, so that `ExtractStructure` finds a network of that structure. This last one
    is in memory only: checkpoints hold the undistorted weights, and a resumed run goes on as if it had not stopped.

    Ranks are chosen once, at the first distortion (or at the start, where the rule looks at shapes alone), and kept: a
    rule that is asked again about weights that it has projected chooses smaller and smaller ranks. They are printed
    and logged then (`lowrank/rank/LAYER`). Layers that first run or thaw later get theirs at the next distortion.

    Args:
        S_D: optimizer steps (not micro-batches) from one distortion to the next.
        method: a decomposition, its snake-case name, a list of which a layer gets the first that is for its kind, or a
            mapping from name patterns to any of these.
        rank: a rank rule, or a mapping from name patterns to rules; default `CompressionRatio(2.0)`.
        targets: which layers; default `Targets()`, all but the first convolution and the last linear layer.
        choose_at: the first distortion comes when so many optimizer steps have been made. For training from scratch,
            where weights say nothing about ranks at first.
        evaluate_distorted: validation, test and prediction see projected weights, as they would be deployed.
        recalibrate_bn: re-estimate batch norm statistics over so many training batches after the last distortion.
        batch_size: inputs in a batch, where its tensors do not tell (lists of images, sequence first); for costs and
            reports for one input.
        metric: in which sense projections are nearest: `"weights"` (Frobenius norm), `"inputs"` (what the layer answers
            on what it is given in training), `"inputs_and_gradients"` (and as the loss's gradients weigh it), or a
            `TrainingMetric`. Layers whose inputs nobody sees keep to Frobenius norm.
        monitor_loss: log the loss of the current batch before and after each distortion (two extra forward passes).

    Logs `lowrank/delta_w`, `||w - w~||_F^2 / N(w)` over all targets, at every distortion, and with `monitor_loss`
    `lowrank/loss_before` and `lowrank/loss_after` (the paper's Figures 3 and 4).
    """

    def __init__(
        self,
        S_D: int = 200,
        method: MethodChoice = "tiled_svd",
        rank: RankChoice | None = None,
        targets: Targets | None = None,
        evaluate_distorted: bool = True,
        recalibrate_bn: int = 0,
        monitor_loss: bool = False,
        choose_at: int = 0,
        batch_size: int | None = None,
        metric: MetricChoice = "weights",
    ) -> None:
        super().__init__(method, rank, targets, evaluate_distorted, recalibrate_bn, batch_size, metric)
        check_int("S_D", S_D, 1, "number of optimizer steps")
        check_int("choose_at", choose_at, 0, "number of optimizer steps")
        self.S_D, self.monitor_loss, self.choose_at = S_D, monitor_loss, choose_at
        self.choices: dict[str, Choice] | None = None
        self._loaded: Mapping[str, list[int] | None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.choices = self._loaded = None

    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        if self._loaded is not None:
            self.choices, self._loaded = _restored(plan, self._loaded), None
            if self.choices.keys() == {c.name for c in plan.compressions}:
                self._show(trainer, plan)
        elif all(c.rule.sees_shapes_alone for c in plan.compressions):
            self._choose(trainer, plan, plan.problems())
        elif self.choices is not None and not self.choices.keys() <= {c.name for c in plan.compressions}:
            self.choices = None  # those of other layers

    def project(self, trainer: pl.Trainer, plan: Plan, occasion: Occasion) -> Distortion:
        problems, choices = plan.problems(self.metrics(plan)), self.choices or {}
        missing = any(c.name not in choices for c in plan.compressions)
        if missing and occasion == "evaluation":  # as it would be deployed now; nothing is settled yet
            choices = self._chosen(plan, problems)
        elif missing:
            choices = self._choose(trainer, plan, problems)
        return distort_(plan, choices, problems)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step < self.choose_at or not is_due(step, self.last_step, self.S_D):
            return
        metrics = {}
        if self.monitor_loss:
            metrics["lowrank/loss_before"] = self._loss(trainer, pl_module, batch, batch_idx)
        metrics["lowrank/delta_w"] = self.distort(trainer, pl_module).delta_w
        if self.monitor_loss:
            metrics["lowrank/loss_after"] = self._loss(trainer, pl_module, batch, batch_idx)
        self.last_step = step
        self.log_metrics(trainer, metrics)

    def _choose(self, trainer: pl.Trainer, plan: Plan, problems: Mapping[str, RankProblem]) -> dict[str, Choice]:
        self.choices = self._chosen(plan, problems)
        self._show(trainer, plan)
        self.log_metrics(trainer, rank_metrics(plan, self.choices))
        return self.choices

    def _chosen(self, plan: Plan, problems: Mapping[str, RankProblem]) -> dict[str, Choice]:
        """By the rules for layers that have no rank yet. A budget that others have met is met with these compressed."""
        found = from_first(lambda: plan.choose_ranks(problems))
        return {name: (self.choices or {}).get(name, choice) for name, choice in found.items()}

    def _show(self, trainer: pl.Trainer, plan: Plan) -> None:
        if trainer.is_global_zero and self.choices is not None:
            print_plan(plan.rows(self.choices))

    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> float:
        return training_loss(trainer, quiet_copy(trainer, pl_module), batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        if self.choices is None or self.plan is None:
            stored = self._loaded
        else:
            known = self.choices  # None for a layer that has joined since the last distortion
            names = {c.name: c for c in self.plan.compressions}
            stored = {name: c.to_list(known[name]) if name in known else None for name, c in names.items()}
        return {**super().state_dict(), "ranks": stored, "asked": self._asked}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = state_dict.get("ranks")  # before 0.2 they were not kept: chosen at the next distortion
        if self._loaded is not None and state_dict["asked"] != self._asked:
            warnings.warn(
                f"The checkpoint's ranks were chosen by {state_dict['asked']}; this is {self._asked}: ranks are chosen "
                "anew",
                stacklevel=2,
            )
            self._loaded, self._left = None, set()

    @property
    def loaded_ranks(self) -> Collection[str] | None:
        return self._loaded

    @property
    def _asked(self) -> str:
        """What ranks are chosen by."""
        metric = "" if self.metric is None else f", metric={self.metric!r}"  # older checkpoints do not say
        return same_words(f"method={self.method!r}, rank={self.rank!r}, targets={self.targets!r}{metric}")


def _restored(plan: Plan, ranks: Mapping[str, list[int] | None]) -> dict[str, Choice]:
    choices = {}
    for c in plan.compressions:
        stored = ranks.get(c.name)
        if stored is None:
            continue
        choices[c.name] = choice = c.from_list(stored)
        if choice.decomposition is not None:
            with c.problem().named():  # of another method, perhaps
                choice.decomposition.check_rank(c.layer, choice.rank)
    return choices
