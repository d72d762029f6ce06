"""A classifier to train with Lightning. It knows nothing of compression."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import SumMetric

from lowrank_pl.checks import check_number
from lowrank_pl.product_decay import deployed_layers, sum_of_squares
from lowrank_pl.structures import Layout


def check_product_decay(value: Any) -> None:
    """Raise `ValueError` for a decay that is no number, or below 0."""
    check_number("product_decay", value, lambda x: 0 <= x < math.inf, "a number of at least 0")


class Classifier(LightningModule):
    """Cross-entropy on the logits of `net`, for batches (images [N, C, H, W], labels int64 [N]).

    Logs `train/loss` per epoch, and `loss` and `accuracy` (in [0, 1]) under `val/` and `test/`.

    Arguments:
        optimizer: makes the optimizer of the parameters it is given.
        scheduler: makes a schedule that steps with the optimizer; called as `scheduler(optimizer,
            total_steps=..., steps_per_epoch=...)`, see `lowrank_pl.schedules`.
        channels_last: store images and convolutions channels-last, which is faster on many devices.
        label_smoothing: in [0, 1), for training only.
        product_decay: weight decay on the weights that layers deploy as, `||U V||^2` for factors U and V; biases and
            norms have none. In place of the optimizer's `weight_decay`, and not part of the logged loss.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        channels_last: bool = False,
        label_smoothing: float = 0.0,
        product_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}")
        check_product_decay(product_decay)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.memory_format)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.label_smoothing, self.product_decay = label_smoothing, product_decay
        self._deployed: dict[nn.Module, Layout] = {}
        # Two sums, because `self.log` in every step takes longer than the step of a small network, and MeanMetric
        # forgets the weights where it need not look for NaN.
        self.train_loss, self.train_images = (SumMetric(nan_strategy="disable") for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net(images.contiguous(memory_format=self.memory_format))
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach() * len(labels))
        self.train_images.update(len(labels))
        return loss + self.product_decay / 2 * sum_of_squares(self._deployed) if self.product_decay else loss

    def on_fit_start(self) -> None:  # when compression has put factors in
        self._deployed = deployed_layers(self) if self.product_decay else {}

    def on_train_epoch_start(self) -> None:  # not called where an epoch is taken up in its middle
        self.train_loss.reset()
        self.train_images.reset()

    def on_train_epoch_end(self) -> None:
        if self.train_images.compute():
            self.log("train/loss", self.train_loss.compute() / self.train_images.compute())
        self.on_train_epoch_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_sums"] = [self.train_loss.sum_value, self.train_images.sum_value]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
            return  # of an epoch that has ended
        for metric, value in zip((self.train_loss, self.train_images), checkpoint.get("train_sums", []), strict=False):
            metric.reset()
            metric.update(value)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        correct = (logits.argmax(1) == labels).float().mean()
        values = {f"{stage}/loss": F.cross_entropy(logits, labels), f"{stage}/accuracy": correct}
        # means over all images: Lightning weights each batch by its size
        self.log_dict(values, batch_size=len(labels), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        if self.scheduler is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(self.trainer.num_training_batches):
            self.trainer.fit_loop.setup_data()  # which the estimate leaves out where `max_steps` is given
        batches = self.trainer.num_training_batches
        steps_per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        scheduler = self.scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
