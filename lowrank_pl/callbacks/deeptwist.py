"""DeepTwist as a callback."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.callbacks.quiet import quiet_copy, training_loss
from lowrank_pl.compression import Plan
from lowrank_pl.methods import Distortion, distort_, is_due
from lowrank_pl.report import print_plan
from lowrank_pl.targets import Targets


class DeepTwist(CompressionCallback):
    """After every `S_D` optimizer steps, replace each target weight by its low-rank projection, and train on.

    Lee, Kwon, Kim & Wei, Learning Low-Rank Approximation for CNNs (2019); there S_D is 100 to 5000. Training always
    ends on a distortion, whatever ended it, so that `ExtractStructure` finds a network of that structure. This last one
    is in memory only: checkpoints hold the undistorted weights, and a resumed run goes on as if it had not stopped.

    Args:
        S_D: optimizer steps (not micro-batches) from one distortion to the next.
        method: a decomposition, its snake-case name, or a mapping from name patterns to either.
        rank: a rank rule, or a mapping from name patterns to rules; default `CompressionRatio(2.0)`.
        targets: which layers; default `Targets()`, all but the first convolution and the last linear layer.
        evaluate_distorted: validation, test and prediction see projected weights, as they would be deployed.
        recalibrate_bn: re-estimate batch norm statistics over so many training batches after the last distortion.
        monitor_loss: log the loss of the current batch before and after each distortion (two extra forward passes).

    Logs `lowrank/delta_w`, `||w - w~||_F^2 / N(w)` over all targets, at every distortion, and with `monitor_loss`
    `lowrank/loss_before` and `lowrank/loss_after` (the paper's Figures 3 and 4).
    """

    def __init__(
        self,
        S_D: int = 200,
        method: Any = "tiled_svd",
        rank: Any = None,
        targets: Targets | None = None,
        evaluate_distorted: bool = True,
        recalibrate_bn: int = 0,
        monitor_loss: bool = False,
    ) -> None:
        super().__init__(method, rank, targets, evaluate_distorted, recalibrate_bn)
        if type(S_D) is not int or S_D < 1:
            raise ValueError(f"Expected argument `S_D` to be at least 1 optimizer step but got {S_D!r}")
        self.S_D, self.monitor_loss = S_D, monitor_loss

    def planned(self, trainer: pl.Trainer, plan: Plan) -> None:
        if trainer.is_global_zero:
            print_plan(plan.rows(plan.choose_ranks()))

    def project(self, trainer: pl.Trainer, plan: Plan, closing: bool) -> Distortion:
        ranks = plan.choose_ranks() if trainer.is_global_zero else None
        return distort_(plan, trainer.strategy.broadcast(ranks))

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not is_due(trainer.global_step, self.last_step, self.S_D):
            return
        metrics = {}
        if self.monitor_loss:
            metrics["lowrank/loss_before"] = self._loss(trainer, pl_module, batch, batch_idx)
        metrics["lowrank/delta_w"] = self.distort(trainer, pl_module).delta_w
        if self.monitor_loss:
            metrics["lowrank/loss_after"] = self._loss(trainer, pl_module, batch, batch_idx)
        self.last_step = trainer.global_step
        self.log_metrics(trainer, metrics)

    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> float:
        return training_loss(trainer, quiet_copy(trainer, pl_module), batch, batch_idx)
