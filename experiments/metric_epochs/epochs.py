"""DeepTwist nearest to the weights and to what layers are given: accuracy after each of 4 epochs.

    python experiments/metric_epochs/epochs.py --data DIR --weights DIR            # test images, into results.csv
    python experiments/metric_epochs/epochs.py --data DIR --weights DIR --choose   # held-back ones, into search.csv

What a file already holds is skipped, so that a stopped experiment is taken up by the same command.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lowrank_pl import CompressionRatio, DeepTwist, Targets, TrainingMetric
from lowrank_pl.data import Arrays
from lowrank_pl.models import CifarResNet, load_weights
from lowrank_pl.module import Classifier
from lowrank_pl.schedules import cosine

HERE = Path(__file__).parent
# Fixed before they ran. The search takes one epoch of four, on 45,000 images, and reports on the other 5,000.
SEARCH: dict[str, Any] = {
    "weights": "weights",
    **{
        f"inputs, every {every}, decay {decay}, places {places}": TrainingMetric("inputs", every, decay, places)
        for every, decay, places in (
            (25, 0.9, 10),
            (25, 0.7, 10),
            (25, 0.5, 10),
            (50, 0.5, 20),
            # added when the first three had run: fewer images are worse, more of them?
            (25, 0.95, 10),
            (25, 0.9, 30),
            (10, 0.9, 10),
        )
    },
}
CELLS: dict[str, Any] = {"weights": "weights", "inputs": "inputs", "inputs_and_gradients": "inputs_and_gradients"}


class Accuracies(pl.Callback):
    """Those of the projected network, epoch by epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(float(trainer.callback_metrics["val/accuracy"]))


class OnTestImages(Arrays):
    """Validates on the test images, of which nothing is chosen."""

    def val_dataloader(self) -> Any:
        return self.test_dataloader()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of cifar10.npz")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of resnet20-cifar10.safetensors")
    parser.add_argument("--choose", action="store_true", help="among settings, by held-back training images")
    arguments = parser.parse_args()
    path = HERE / ("search.csv" if arguments.choose else "results.csv")
    for name, metric in (SEARCH if arguments.choose else CELLS).items():
        if name not in {row["cell"] for row in read(path)}:
            found = accuracies(arguments, metric, 1 if arguments.choose else 4)
            row = {"cell": name, **{f"epoch {i}": f"{100 * x:.2f}" for i, x in enumerate(found, 1)}}
            write(path, [*read(path), row])


def accuracies(arguments: argparse.Namespace, metric: Any, epochs: int) -> list[float]:
    pl.seed_everything(0)
    kind, held_back = (Arrays, 0.1) if arguments.choose else (OnTestImages, 0.0)
    data = kind(
        file=str(arguments.data / "cifar10.npz"), val_fraction=held_back, augment=True, mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    net = CifarResNet(input_shape=(3, 32, 32), num_classes=10, depth=20)
    load_weights(net, str(arguments.weights / "resnet20-cifar10.safetensors"))

    def scheduled(optimizer: Any, total_steps: float, steps_per_epoch: int) -> Any:
        return cosine(optimizer, 4 * steps_per_epoch, steps_per_epoch)

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)

    module = Classifier(net, sgd, scheduled, channels_last=True)
    twist = DeepTwist(S_D=200, method="svd", rank=CompressionRatio(3.0), metric=metric,
                      targets=Targets(types=["Conv2d"], skip_first=True, skip_last=False))  # fmt: skip
    heard = Accuracies()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[twist, heard], precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return heard.found


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
