"""Table 1 and Figure 6 of Lee et al. (2019) and the whole-network check on CIFAR-10, with a shortened schedule.

    python experiments/deeptwist_cifar10/run.py --data cifar10.npz --weights DIR --runs runs/deeptwist_cifar10

One cell after another; finished cells are skipped, so that it can be stopped and called again. Writes results.csv
beside this file after every cell. DIR holds resnet20-cifar10.safetensors and resnet32-cifar10.safetensors.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DEEPTWIST = ["compression.S_D=200"]


def cells() -> dict[str, list[str]]:
    """Name of the cell -> overrides of `lowrank-pl train experiment=deeptwist_cifar10`."""
    found: dict[str, list[str]] = {"resnet20-whole-tiled64-4x": ["model=resnet20", *DEEPTWIST]}
    for ratio in (2, 4):
        for tile in (64, 32, 16, 8):
            found[f"table1-tile{tile}-{ratio}x"] = [
                "model=resnet32", *DEEPTWIST, "targets.min_channels=64",
                f"decomposition.tile={tile}", f"rank.x={ratio}",
            ]  # fmt: skip
    for ratio in (2, 4):
        for method in ("tiled_svd", "svd", "tucker2"):
            found[f"figure6-{method}-{ratio}x"] = [
                "model=resnet32", *DEEPTWIST, f"decomposition={method}", f"rank.x={ratio}", "trainer.max_epochs=2",
            ]  # fmt: skip
        found[f"figure6-tucker2-conventional-{ratio}x"] = [
            "model=resnet32", "compression=direct", "decomposition=tucker2", f"rank.x={ratio}", "trainer.max_epochs=2",
        ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/deeptwist_cifar10"))
    parser.add_argument("--only", default="", help="cells whose name contains this")
    arguments = parser.parse_args()
    for name, overrides in cells().items():
        directory = arguments.runs / name
        if arguments.only in name and not is_finished(directory):
            model = overrides[0].removeprefix("model=")
            subprocess.run(
                [
                    sys.executable, "-c", "from lowrank_pl.cli import main; main()", "train",
                    "experiment=deeptwist_cifar10", *overrides, f"data.file={arguments.data.absolute()}",
                    f"model.weights={(arguments.weights / f'{model}-cifar10.safetensors').absolute()}",
                    f"hydra.run.dir={directory}", "trainer.enable_progress_bar=false",
                ],
                check=True,
            )  # fmt: skip
        collect(arguments.runs)


def is_finished(directory: Path) -> bool:
    facts = directory / "run.json"
    return facts.is_file() and json.loads(facts.read_text())["status"] == "finished"


def collect(runs: Path) -> None:
    rows = []
    for name in cells():
        if is_finished(runs / name):
            report = json.loads((runs / name / "report.json").read_text())
            dense, compressed = report["dense"], report["compressed"]
            rows.append({
                "cell": name,
                "accuracy_before_last_distortion": round(100 * dense["accuracy"], 2),
                "accuracy": round(100 * compressed["accuracy"], 2),
                "params": compressed["params"],
                "params_ratio": round(dense["params"] / compressed["params"], 3),
                "macs": compressed["macs"],
            })  # fmt: skip
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["cell"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
