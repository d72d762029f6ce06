"""A run: its directory, and what happens in it."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lowrank_pl.callbacks import CompressionCallback, ExtractStructure
from lowrank_pl.extraction import extracted_part
from lowrank_pl.figures import draw_run
from lowrank_pl.files import write_files
from lowrank_pl.module import Classifier
from lowrank_pl.report import Report, summarize, terminal
from lowrank_pl.storage import save_compressed

_PACKAGES = ("lowrank_pl", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


@dataclass(frozen=True)
class Run:
    """A run directory: `config.yaml` (resolved) and `run.json` (versions, command, seed, status)."""

    directory: Path
    facts: dict[str, Any]

    @classmethod
    def start(cls, directory: str | Path, config: str, overrides: list[str], seed: int) -> Run:
        """Make the directory and write what is known before anything is run."""
        path = Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": " ".join(["lowrank-pl train", *overrides]),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        run = cls(path, facts)
        write_files({path / "config.yaml": config.encode()})
        run.set_status("running")
        return run

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Whatever happens inside is written down as the run's status."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.set_status("interrupted")
            raise
        except BaseException:
            self.set_status("failed")
            raise
        self.set_status("finished")

    def set_status(self, status: str) -> None:
        write_files({self.directory / "run.json": _json({"status": status, **self.facts})})


def execute(
    run: Run,
    module: Classifier,
    data: pl.LightningDataModule,
    make_trainer: Callable[..., pl.Trainer],
    compression: Any,
    logger: Any,
) -> None:
    """Train, extract, test both networks, and write and show the report.

    `compression` is a callback, or a function that compresses the module before it is trained, or None.
    """
    example = next(iter(data.test_dataloader()))[0][:32]
    dense = copy.deepcopy(module.net)
    checkpoints = ModelCheckpoint(run.directory / "checkpoints", save_last=True, save_top_k=1)
    callbacks: list[pl.Callback] = [checkpoints]
    extraction = ExtractStructure(submodule="net")
    if isinstance(compression, CompressionCallback):
        callbacks += [compression, extraction]
    elif compression is not None:
        module = compression(module, example_input=example)
    trainer = make_trainer(callbacks=callbacks, logger=logger, default_root_dir=str(run.directory))
    trainer.fit(module, data)
    tester = make_trainer(callbacks=[], logger=False, enable_progress_bar=False)
    if isinstance(compression, CompressionCallback):
        with compression.training_weights():
            dense = copy.deepcopy(module.net)
        compressed = extraction.extracted
        assert compressed is not None
    else:
        compressed = extracted_part(module, "net")
        dense = dense if compression is not None else module.net
    accuracies = [_test(tester, module, net, data) for net in (dense, compressed)]
    memory = {"memory_format": module.memory_format}  # as they were trained and will be deployed
    report = summarize(dense.cpu().to(**memory), compressed.cpu().to(**memory), example.contiguous(**memory))
    _finish(run, report, accuracies, compressed)


def _test(tester: pl.Trainer, module: Classifier, net: nn.Module, data: pl.LightningDataModule) -> float:
    classifier = Classifier(net, module.optimizer, channels_last=module.memory_format == torch.channels_last)
    return float(tester.test(classifier, data, verbose=False)[0]["test/accuracy"])


def _finish(run: Run, report: Report, accuracies: list[float], compressed: nn.Module) -> None:
    values = report.to_dict()
    for network, accuracy in zip(("dense", "compressed"), accuracies, strict=True):
        values[network] = {"accuracy": accuracy, **values[network]}
    pair = (accuracies[0], accuracies[1])
    write_files({
        run.directory / "report.json": _json(values),
        run.directory / "report.md": report.to_markdown(accuracy=pair).encode(),
    })  # fmt: skip
    save_compressed(compressed, run.directory / "compressed")
    draw_run(run.directory / "metrics.csv", run.directory / "figure.png")
    console = terminal()
    console.print(report.to_table(accuracy=pair))
    console.print(f"Everything is in {run.directory}", highlight=False, soft_wrap=True)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
