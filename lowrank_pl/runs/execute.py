"""What happens in a run, stage by stage. A stage that is done is not done again."""

from __future__ import annotations

import copy
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.callbacks import AlternatingCallback, CompressionCallback, ExtractStructure
from lowrank_pl.checksums import add_sum, check_sum, write_summed
from lowrank_pl.extraction import RECORD, extracted_part
from lowrank_pl.figures import draw_run
from lowrank_pl.files import write_files
from lowrank_pl.linalg import singular_energies
from lowrank_pl.models import load_weights
from lowrank_pl.module import Classifier
from lowrank_pl.norms import fold_norms_
from lowrank_pl.reading import first_line
from lowrank_pl.report import summarize
from lowrank_pl.run_files import as_json, locked
from lowrank_pl.runs.directory import Run
from lowrank_pl.runs.diverging import FiniteLoss
from lowrank_pl.runs.metrics_file import MetricsFile
from lowrank_pl.runs.one_shot import OneShot
from lowrank_pl.runs.phases import Phases
from lowrank_pl.runs.progress import EpochLines, Progress
from lowrank_pl.runs.recipe import Recipe, Training
from lowrank_pl.runs.resumable import Resumable, WholeFiles, newest_checkpoint
from lowrank_pl.runs.state import check_data, stages_again
from lowrank_pl.runs.stopping import Interrupted, Stop
from lowrank_pl.storage import load_compressed, save_compressed
from lowrank_pl.terminal import say, terminal


def execute(run: Run, recipe: Recipe, stop: Stop | None = None, force: bool = False) -> None:
    """Train, compress, extract, fine-tune, test the networks, and write and show the report.

    Goes on from the newest checkpoint in the run's directory, and from the stages that are done and undamaged. Raises
    `Diverged` where a loss is no longer finite, and `ValueError`, unless `force`, where the data or `metrics.csv` are
    not what they were.
    """
    return _Execution(run, recipe, stop, force).execute()


class _Execution:
    def __init__(self, run: Run, recipe: Recipe, stop: Stop | None, force: bool) -> None:
        self.run, self.recipe, self.stop, self.directory = run, recipe, stop, run.directory
        self.force = force
        self.progress = Progress()
        self.example = next(iter(recipe.data.test_dataloader()))[0][:32]

    def execute(self) -> None:
        if self.stop is not None:
            self.stop.waits = True
        check_data(self.run, self.recipe.data, self.force)
        again, reason = stages_again(self.directory, self.run.facts["done"])
        if reason:
            warnings.warn(f"{reason}: made anew, from the last checkpoint", stacklevel=2)
            self.run.record(done=[stage for stage in self.run.facts["done"] if stage not in again])
        tuned = self.recipe.finetune is not None and self.recipe.compression is not None
        last = "extracted" if tuned else "compressed"
        if not self.run.is_done("fit"):
            shutil.rmtree(self.directory / "finetune", ignore_errors=True)  # of another network
            dense, compressed = self.train()
            write_summed(self.directory / "dense.safetensors", _weights(dense))
            save_compressed(compressed, self.directory / last)
            if (self.directory / "metrics.csv").is_file():
                add_sum(self.directory / "metrics.csv")
            self.mark_done("fit")
        if tuned and not self.run.is_done("finetune"):
            assert self.recipe.finetune is not None
            compressed = load_compressed(self.recipe.net, self.directory / last)
            write_files({self.directory / "extracted" / "test.json": as_json(self.test(compressed))})
            classifier = self.recipe.classifier(compressed, self.recipe.finetune)
            length, logger = _epochs(self.recipe.finetune), self.logger("finetune")
            phases = [Phases(self.recipe.finetune.phases)] if self.recipe.finetune.phases else []
            self.fit("fine-tuning", self.directory / "finetune", classifier, [*phases], length, logger)
            save_compressed(_trained(compressed), self.directory / "compressed")
            self.mark_done("finetune")
        self.report()

    def mark_done(self, stage: str) -> None:
        self.run.mark_done(stage)
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.stop is not None:
            self.stop.check()

    def train(self) -> tuple[nn.Module, nn.Module]:
        """The dense network to compare with, and the compressed one, before fine-tuning."""
        net, compression = copy.deepcopy(self.recipe.net), self.recipe.compression
        if self.recipe.reference is not None:
            load_weights(net, self.reference(self.recipe.reference))
        dense, module = copy.deepcopy(net), self.recipe.classifier(net, self.recipe.training)
        if isinstance(compression, CompressionCallback):
            extraction = ExtractStructure(submodule="net")
            length = compression.length if isinstance(compression, AlternatingCallback) else {}
            self.fit("training", self.directory, module, [compression, extraction], length, self.logger())
            if not isinstance(compression, AlternatingCallback):  # whose dense network is the reference
                with compression.training_weights():
                    dense = copy.deepcopy(module.net)
            assert extraction.extracted is not None
            return dense, extraction.extracted
        if compression is not None:
            module = self.compressed(compression, module)
            if not compression.train:
                return dense, extracted_part(module, "net")
        self.fit("training", self.directory, module, [], {}, self.logger())
        compressed = _trained(extracted_part(module, "net"))
        return (module.net if compression is None else dense), compressed

    def compressed(self, compression: OneShot, module: Classifier) -> Classifier:
        """What is made of a module before any training, on the device that training runs on."""
        if compression.needs_images:
            self.progress.say(f"compressing, on the first {compression.samples:,} training images")
        trainer = self.recipe.make_trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        device = trainer.strategy.root_device
        device = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
        made = compression(module.to(device), self.example.to(device), self.training_images, self.check)
        self.check()
        return made.cpu()  # type: ignore[return-value]

    def training_images(self) -> Iterable[Any]:
        """As they are, and in their order."""
        data = self.recipe.data
        if not hasattr(data, "train_eval_dataloader"):
            raise ValueError(f"`data`: {type(data).__name__} has no train_eval_dataloader() of plain images")
        loader: Iterable[Any] = data.train_eval_dataloader()
        return loader

    def reference(self, training: Training) -> Path:
        """The reference's weights, in the run's directory: trained here, or by another run of the same sweep."""
        own, references = self.directory / "reference.safetensors", self.recipe.references
        shared = own if references is None else references / f"{self.recipe.reference_key}.safetensors"
        if _is_whole(own):
            return own
        with locked(shared.with_suffix(".lock"), self.check):  # others wait for it
            for half in shared.parent.glob(f".{shared.name}*.new"):  # where a run was killed while it wrote
                half.unlink()
            if not _is_whole(shared):
                module = self.recipe.classifier(copy.deepcopy(self.recipe.net), training)
                phases = [Phases(training.phases)] if training.phases else []
                self.fit("reference", self.directory / "reference", module, [*phases], _epochs(training), None)
                write_summed(shared, _weights(module.net))
        if shared != own:
            write_summed(own, shared.read_bytes())
        return own

    def logger(self, prefix: str = "") -> Logger | None:
        """The logger beside `metrics.csv`, if one was asked for; after a resume it goes on where it was."""
        make = self.recipe.make_logger
        if make is None:
            return None
        identity = {"WandbLogger": "id", "MLFlowLogger": "run_id"}.get(getattr(make, "func", make).__name__)
        known = self.run.facts.get("logger_id")
        extra = {identity: known} if identity is not None and known is not None else {}
        logger: Any = make(save_dir=str(self.directory), prefix=prefix, **extra)
        if identity is not None and known is None:
            try:
                _ = logger.experiment  # which makes the identity
            except Exception as error:  # each library has its own: without a login, a server, a network
                raise ValueError(f"`logger`: {first_line(error)}") from error
            self.run.record(logger_id=logger.version)
        if known is None and not prefix:  # MLflow refuses others later
            logger.log_hyperparams(self.recipe.hyperparameters)
        made: Logger = logger
        return made

    def fit(
        self,
        stage: str,
        directory: Path,
        module: pl.LightningModule,
        callbacks: list[pl.Callback],
        length: dict[str, int],
        logger: Logger | None,
    ) -> None:
        """Train, with checkpoints and metrics in this directory; each stage draws its random numbers from the start.

        A progress bar is drawn in terminals alone; elsewhere there are a few lines.
        """
        pl.seed_everything(self.recipe.seed, verbose=False)
        checkpoints = directory / "checkpoints"
        resumable = Resumable(checkpoints, self.stop, self.recipe.checkpoint_every, force=self.force)
        finite = FiniteLoss(stage)  # first: a compression stumbles over what is not finite
        lines = EpochLines(self.progress, stage)
        bar = {} if sys.stdout.isatty() else {"enable_progress_bar": False}
        trainer = self.recipe.make_trainer(
            callbacks=[finite, *([] if self.stop is None else [self.stop]), *callbacks, resumable, lines],
            logger=[MetricsFile(directory), *([] if logger is None else [logger])],
            plugins=[WholeFiles()],
            default_root_dir=str(directory),
            **length,
            **bar,
        )
        newest = newest_checkpoint(checkpoints)
        begin = "" if newest is None else f"from {newest.relative_to(self.directory)} "
        self.progress.say(f"{stage}: {begin}{_end(trainer)}")
        try:
            trainer.fit(module, self.recipe.data, ckpt_path=newest)
        except Exception as error:
            if not isinstance(error, Interrupted):
                finite.check()
            if isinstance(error, RuntimeError) and newest and "loading state_dict" in str(error):
                raise ValueError(f"{newest} is of another network than the config ({str(error)[:300]} ...)") from error
            raise
        self.check()

    def test(self, net: nn.Module) -> dict[str, float]:
        """Accuracy on the test images, and if asked for accuracy and loss on the training images."""
        callbacks = [] if self.stop is None else [self.stop]
        place = str(self.directory)  # where Lightning's profilers write
        tester = self.recipe.make_trainer(
            callbacks=callbacks, logger=False, enable_progress_bar=False, default_root_dir=place
        )
        module, data = self.recipe.classifier(net, self.recipe.training), self.recipe.data
        values = {"accuracy": float(tester.test(module, data, verbose=False)[0]["test/accuracy"])}
        if self.recipe.report_train:
            (train,) = tester.test(module, self.training_images(), verbose=False)
            values |= {"train_accuracy": train["test/accuracy"], "train_loss": train["test/loss"]}
        self.check()
        return values

    def report(self) -> None:
        """Test both networks, and write and show what came out."""
        dense = copy.deepcopy(self.recipe.net)
        load_weights(dense, self.directory / "dense.safetensors")
        compressed = load_compressed(self.recipe.net, self.directory / "compressed")
        self.progress.say("testing both networks")
        tested = {"dense": self.test(dense), "compressed": self.test(compressed)}
        pair = (tested["dense"]["accuracy"], tested["compressed"]["accuracy"])
        # as they were trained and will be deployed
        memory = {"memory_format": torch.channels_last if self.recipe.channels_last else torch.contiguous_format}
        example = self.example.contiguous(**memory)
        self.progress.say("timing both networks, layer by layer")
        if isinstance(self.recipe.compression, OneShot) and self.recipe.compression.initialize == "variance":
            self.progress.say("the dense network has not been trained: compare accuracies with another run's")
        report = summarize(dense.cpu().to(**memory), compressed.cpu().to(**memory), example)
        values = report.to_dict()
        for network, results in tested.items():
            values[network] = {**results, **values[network]}
        spectra = _spectra(dense)
        for layer in values["layers"]:
            layer["spectrum"] = spectra.get(layer["name"])
        write_summed(self.directory / "report.json", as_json(values))
        write_files({self.directory / "report.md": report.to_markdown(accuracy=pair).encode()})
        logger = self.logger("final")
        if logger is not None:
            figures = {
                f"{network}/{quantity}": values[network][quantity]
                for network in ("dense", "compressed")
                for quantity in ("accuracy", "params", "macs")
            }
            logger.log_metrics(figures, step=0)
            logger.finalize("success")
        draw_run(self.directory / "metrics.csv", self.directory / "figure.png")
        terminal().print(report.to_table(accuracy=pair))
        say(f"Everything is in {self.directory}")


def _is_whole(file: Path) -> bool:
    """Whether a reference is there, and is what was written; warns of one that is not."""
    if not file.is_file():
        return False
    try:
        check_sum(file)
        with safe_open(file, framework="pt"):
            return True
    except (ValueError, SafetensorError) as error:
        reason = str(error) if str(file) in str(error) else f"{file} is damaged ({error})"
        warnings.warn(f"{reason}: made anew", stacklevel=2)
        return False


def _end(trainer: pl.Trainer) -> str:
    """Where a training ends at the latest, in words."""
    pairs = (("epoch", trainer.max_epochs), ("step", trainer.max_steps))
    ends = [f"{unit} {number}" for unit, number in pairs if number is not None and number > 0]
    return f"up to {' or '.join(ends)}" if ends else "without a limit"


def _epochs(training: Training) -> dict[str, int]:
    return {} if training.length is None else {"max_epochs": training.length, "max_steps": -1}


def _trained(net: nn.Module) -> nn.Module:
    """Without the errors of its layers' outputs, which were those of other factors, and the norms between factors."""
    getattr(net, RECORD, {}).pop("responses", None)
    fold_norms_(net)
    return net


def _weights(net: nn.Module) -> bytes:
    return save({name: tensor.detach().contiguous().cpu() for name, tensor in net.state_dict().items()})


def _spectra(net: nn.Module) -> dict[str, dict[str, Sequence[float]]]:
    """Singular values of every layer's lowered kernel `T x (S d d)`, of the largest's size, at a few indices from 1."""
    spectra: dict[str, dict[str, Sequence[float]]] = {}
    for name, layer in find_maps(net).items():
        matrix = layer.read().flatten(1)
        energies = singular_energies(matrix).clamp(min=0).sqrt()
        index = sorted({round(i) for i in np.geomspace(1, len(energies), min(len(energies), 24))})
        values = (energies / energies[0].clamp(min=1e-300))[torch.tensor(index) - 1]
        spectra[name] = {"index": index, "value": [float(f"{value:.4g}") for value in values.tolist()]}
    return spectra
