"""A run: its directory, and what happens in it."""

from __future__ import annotations

import copy
import hashlib
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
from safetensors.torch import save
from torch import nn

from lowrank_pl.callbacks import CompressionCallback, ExtractStructure, LearningCompression
from lowrank_pl.extraction import extracted_part
from lowrank_pl.figures import draw_run
from lowrank_pl.files import write_files
from lowrank_pl.models import load_weights
from lowrank_pl.module import Classifier
from lowrank_pl.report import summarize, terminal
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


@dataclass(frozen=True)
class Training:
    """How a network is trained: what makes its optimizer and schedule, and for how many epochs (None: the trainer's).

    With `always`, a reference is trained also for methods that could start from untrained weights.
    """

    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None = None
    epochs: int | None = None
    always: bool = False


@dataclass(frozen=True)
class Recipe:
    """What a run is made of.

    `compression` is a callback, or a function that compresses a module before it is trained, or None. With `reference`
    the network is trained first, unless the folder `references` has it under `reference_key` from another run.
    `finetune` trains the extracted network's factors at the end. With `report_train`, loss and accuracy on the training
    images are reported too.
    """

    data: pl.LightningDataModule
    net: nn.Module
    training: Training
    make_trainer: Callable[..., pl.Trainer]
    make_logger: Callable[..., Any]
    compression: Any = None
    reference: Training | None = None
    finetune: Training | None = None
    references: Path | None = None
    reference_key: str = ""
    seed: int = 0
    channels_last: bool = False
    label_smoothing: float = 0.0
    report_train: bool = False

    def classifier(self, net: nn.Module, training: Training) -> Classifier:
        """The network as it is trained and tested."""
        return Classifier(net, training.optimizer, training.scheduler, self.channels_last, self.label_smoothing)


def execute(run: Run, recipe: Recipe) -> None:
    """Train, compress, extract, fine-tune, test the networks, and write and show the report."""
    net, compression = recipe.net, recipe.compression
    if recipe.reference is not None:
        load_weights(net, _reference(run, recipe, recipe.reference))
    dense, module = copy.deepcopy(net), recipe.classifier(net, recipe.training)
    example = next(iter(recipe.data.test_dataloader()))[0][:32]
    if isinstance(compression, CompressionCallback):
        extraction = ExtractStructure(submodule="net")
        length = compression.length if isinstance(compression, LearningCompression) else {}
        _fit(run.directory, recipe, module, [compression, extraction], length)
        if not isinstance(compression, LearningCompression):  # whose dense network is the reference
            with compression.training_weights():
                dense = copy.deepcopy(module.net)
        assert extraction.extracted is not None
        compressed = extraction.extracted
    else:
        if compression is not None:
            module = compression(module, example_input=example)
        _fit(run.directory, recipe, module, [], {})
        compressed = extracted_part(module, "net")
        dense = module.net if compression is None else dense
    if recipe.finetune is not None and compressed is not dense:
        save_compressed(compressed, run.directory / "extracted")
        write_files({run.directory / "extracted" / "test.json": _json(_test(recipe, compressed))})
        tuned = recipe.classifier(compressed, recipe.finetune)
        _fit(run.directory / "finetune", recipe, tuned, [], _epochs(recipe.finetune))
    _finish(run, recipe, dense, compressed, example)


def _reference(run: Run, recipe: Recipe, training: Training) -> Path:
    """The reference's weights, in the run's directory: trained here, or by an earlier run of the same sweep."""
    own = run.directory / "reference.safetensors"
    shared = own if recipe.references is None else recipe.references / f"{recipe.reference_key}.safetensors"
    if not own.is_file() and not shared.is_file():
        module = recipe.classifier(copy.deepcopy(recipe.net), training)
        _fit(run.directory / "reference", recipe, module, [], _epochs(training))
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in module.net.state_dict().items()}
        shared.parent.mkdir(parents=True, exist_ok=True)
        write_files({shared: save(state)})
    if not own.is_file():
        write_files({own: shared.read_bytes()})
    return own


def _epochs(training: Training) -> dict[str, int]:
    return {} if training.epochs is None else {"max_epochs": training.epochs, "max_steps": -1}


def _fit(
    directory: Path, recipe: Recipe, module: pl.LightningModule, callbacks: list[pl.Callback], length: dict[str, int]
) -> None:
    """Train, with checkpoints and metrics in this directory; each stage draws its random numbers from the start."""
    pl.seed_everything(recipe.seed, verbose=False)
    checkpoints = ModelCheckpoint(directory / "checkpoints", save_last=True, save_top_k=1)
    trainer = recipe.make_trainer(
        callbacks=[checkpoints, *callbacks],
        logger=recipe.make_logger(save_dir=str(directory)),
        default_root_dir=str(directory),
        **length,
    )
    trainer.fit(module, recipe.data)


def _test(recipe: Recipe, net: nn.Module) -> dict[str, float]:
    """Accuracy on the test images, and if asked for accuracy and loss on the training images."""
    tester = recipe.make_trainer(callbacks=[], logger=False, enable_progress_bar=False)
    module = recipe.classifier(net, recipe.training)
    values = {"accuracy": float(tester.test(module, recipe.data, verbose=False)[0]["test/accuracy"])}
    if recipe.report_train:
        (train,) = tester.test(module, recipe.data.train_eval_dataloader(), verbose=False)  # type: ignore[attr-defined]
        values |= {"train_accuracy": train["test/accuracy"], "train_loss": train["test/loss"]}
    return values


def _finish(run: Run, recipe: Recipe, dense: nn.Module, compressed: nn.Module, example: torch.Tensor) -> None:
    tested = {"dense": _test(recipe, dense), "compressed": _test(recipe, compressed)}
    pair = (tested["dense"]["accuracy"], tested["compressed"]["accuracy"])
    # as they were trained and will be deployed
    memory = {"memory_format": torch.channels_last if recipe.channels_last else torch.contiguous_format}
    report = summarize(dense.cpu().to(**memory), compressed.cpu().to(**memory), example.contiguous(**memory))
    values = report.to_dict()
    for network, results in tested.items():
        values[network] = {**results, **values[network]}
    write_files({
        run.directory / "report.json": _json(values),
        run.directory / "report.md": report.to_markdown(accuracy=pair).encode(),
    })  # fmt: skip
    save_compressed(compressed, run.directory / "compressed")
    draw_run(run.directory / "metrics.csv", run.directory / "figure.png")
    console = terminal()
    console.print(report.to_table(accuracy=pair))
    console.print(f"Everything is in {run.directory}", highlight=False, soft_wrap=True)


def key_of(values: Any) -> str:
    """A short name for plain values: the same for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
