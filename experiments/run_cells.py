"""Run the cells of an experiment, one after another, and gather their results.

    python experiments/run_cells.py experiments/deeptwist_cifar10 --data DIR --weights DIR

`cells.yaml` in the folder names the runs: `command` is what all have in common, and a cell whose first word is one of
`groups` begins with that group's words. results.csv beside it is written after every cell, and what it already
holds is skipped, so that a stopped experiment is taken up by the same command.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowrank_pl.sweep import command

COLUMNS = (
    "cell", "epochs", "accuracy_before_last_distortion", "accuracy", "params", "params_ratio", "macs", "macs_ratio",
    "ranks", "train_loss", "train_accuracy", "accuracy_extracted", "dense_train_loss", "dense_train_accuracy",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--weights", type=Path, default=Path(), help="the folder of the pre-trained networks")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories go")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    arguments = parser.parse_args()
    spec: Any = OmegaConf.to_container(OmegaConf.load(arguments.experiment / "cells.yaml"))
    runs = arguments.runs.absolute() / arguments.experiment.name
    places = {"data": arguments.data.absolute(), "weights": arguments.weights.absolute(), "runs": runs}
    for name, words in spec["cells"].items():
        if arguments.only not in name:
            continue
        if name not in read(arguments.experiment) and not is_finished(runs / name):
            first, _, rest = words.partition(" ")
            overrides = f"{spec['groups'][first]} {rest}" if first in spec.get("groups", {}) else words
            given = f"{spec['command']} {overrides}".format(**places).split()
            words = ["train", *given, f"hydra.run.dir={runs / name}"]
            if (runs / name / "config.yaml").is_file():  # stopped before
                words = ["resume", str(runs / name)]
            subprocess.run(command(*words), check=True)
        if is_finished(runs / name):
            write(arguments.experiment, list(spec["cells"]), row(name, runs / name))


def is_finished(directory: Path) -> bool:
    facts = directory / "run.json"
    return facts.is_file() and json.loads(facts.read_text())["status"] == "finished"


def row(name: str, directory: Path) -> dict[str, Any]:
    report = json.loads((directory / "report.json").read_text())
    dense, compressed = report["dense"], report["compressed"]
    values: dict[str, Any] = {"cell": name, "epochs": epochs(OmegaConf.load(directory / "config.yaml"))}
    values["accuracy_before_last_distortion"] = f"{100 * dense['accuracy']:.2f}"
    values["accuracy"] = f"{100 * compressed['accuracy']:.2f}"
    for unit in ("params", "macs"):
        values |= {unit: compressed[unit], f"{unit}_ratio": f"{dense[unit] / compressed[unit]:.3f}"}
    values["ranks"] = " ".join(layer["structure"].replace(" > ", ">") for layer in report["layers"])
    for prefix, network in (("", compressed), ("dense_", dense)):
        if "train_loss" in network:
            values[f"{prefix}train_loss"] = f"{network['train_loss']:.3e}"
            values[f"{prefix}train_accuracy"] = f"{100 * network['train_accuracy']:.3f}"
    extracted = directory / "extracted" / "test.json"
    if extracted.is_file():
        values["accuracy_extracted"] = f"{100 * json.loads(extracted.read_text())['accuracy']:.2f}"
    return values


def epochs(config: Any) -> str:
    """How long a run trains, stage by stage: the reference, the method, then, where it is fine-tuned, the factors."""
    method = config.compression
    if not method.get("_target_", "").endswith((".LearningCompression", ".ADMM")):
        stages = [config.trainer.max_epochs * method.get("train", True), config.finetune.get("epochs", 0)]
    elif method.l_step_epochs is not None:
        stages = [(method.steps - 1) * method.l_step_epochs, config.finetune.get("epochs", 0)]
    else:
        stages = [f"{(method.steps - 1) * method.l_step_steps} steps", config.finetune.get("epochs", 0)]
    reference = config.reference.get("epochs") if config.model.weights is None else None
    return " + ".join(str(stage) for stage in (reference, *stages) if stage)


def read(experiment: Path) -> dict[str, dict[str, Any]]:
    if not (experiment / "results.csv").is_file():
        return {}
    with open(experiment / "results.csv", newline="") as file:
        return {line["cell"]: line for line in csv.DictReader(file)}


def write(experiment: Path, order: list[str], new: dict[str, Any]) -> None:
    rows = {**read(experiment), new["cell"]: new}
    with open(experiment / "results.csv", "w", newline="") as file:
        names = [name for name in COLUMNS if any(row.get(name) for row in rows.values())]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[name] for name in order if name in rows)


if __name__ == "__main__":
    main()
