"""Run the cells of an experiment, one after another, and gather their results.

    python experiments/run_cells.py experiments/deeptwist_cifar10 --data DIR --weights DIR

`cells.yaml` in the experiment's folder names the runs; results.csv beside it is written after every one, and what it
already holds is skipped, so that a stopped experiment is taken up by the same command.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

COLUMNS = ("cell", "accuracy_before_last_distortion", "accuracy", "params", "params_ratio", "macs", "macs_ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set")
    parser.add_argument("--weights", type=Path, default=Path(), help="the folder of the pre-trained networks")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories go")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    arguments = parser.parse_args()
    spec: Any = OmegaConf.to_container(OmegaConf.load(arguments.experiment / "cells.yaml"))
    places = {"data": arguments.data.absolute(), "weights": arguments.weights.absolute()}
    for name, overrides in spec["cells"].items():
        if arguments.only not in name:
            continue
        directory = arguments.runs / arguments.experiment.name / name
        if name not in read(arguments.experiment) and not is_finished(directory):
            command = f"{spec['command']} {overrides}".format(**places).split()
            program = [sys.executable, "-c", "from lowrank_pl.cli import main; main()", "train"]
            subprocess.run([*program, *command, f"hydra.run.dir={directory}"], check=True)
        if is_finished(directory):
            write(arguments.experiment, list(spec["cells"]), row(name, directory))


def is_finished(directory: Path) -> bool:
    facts = directory / "run.json"
    return facts.is_file() and json.loads(facts.read_text())["status"] == "finished"


def row(name: str, directory: Path) -> dict[str, Any]:
    report = json.loads((directory / "report.json").read_text())
    dense, compressed = report["dense"], report["compressed"]
    values = [name, f"{100 * dense['accuracy']:.2f}", f"{100 * compressed['accuracy']:.2f}"]
    for unit in ("params", "macs"):
        values += [compressed[unit], f"{dense[unit] / compressed[unit]:.3f}"]
    return dict(zip(COLUMNS, values, strict=True))


def read(experiment: Path) -> dict[str, dict[str, Any]]:
    if not (experiment / "results.csv").is_file():
        return {}
    with open(experiment / "results.csv", newline="") as file:
        return {line["cell"]: line for line in csv.DictReader(file)}


def write(experiment: Path, order: list[str], new: dict[str, Any]) -> None:
    rows = {**read(experiment), new["cell"]: new}
    with open(experiment / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[name] for name in order if name in rows)


if __name__ == "__main__":
    main()
