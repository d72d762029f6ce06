"""Compress pre-trained CIFAR ResNets without training, and write what is left of their accuracy to results.csv.

    python experiments/reconstruction/reconstruct.py --data DIR --weights DIR

`grid.yaml` beside it names the networks, ranks and rows. What results.csv already holds is skipped, so that a stopped
experiment is taken up by the same command.
"""

import argparse
import copy
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lowrank_pl import CostBudget, Samples, Targets, compress, summarize
from lowrank_pl.decompositions import Choice
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.methods.batch_norms import reestimate_batch_norms_
from lowrank_pl.models import CifarResNet, load_weights
from lowrank_pl.ranks import RankProblem, RankRule

HERE = Path(__file__).parent
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Uniform(RankRule):
    """The largest rank with at most this share of the MACs in every layer."""

    share: float

    def __call__(
        self, problems: Sequence[RankProblem], error_weight: float = 1.0, others: Sequence[LayerSpec] = ()
    ) -> list[Choice]:
        choices = []
        for problem in problems:
            kind, most = problem.decomposition, self.share * (problem.layer.macs or 0)
            fitting = [r for r in range(1, problem.full[0] + 1) if (kind.layout(problem.layer, (r,)).macs or 0) <= most]
            choices.append(Choice(kind, (max(fitting, default=1),)))
        return choices


@dataclass(frozen=True)
class Cell:
    """One row of results.csv, as it is asked for."""

    depth: int
    images: int
    ranks: str  # uniform, macs, params
    share: float
    row: str  # weights, inputs, outputs, asymmetric, nonlinear


def cells() -> list[Cell]:
    """In the order of running."""
    found = []
    for group in OmegaConf.load(HERE / "grid.yaml"):
        for ranks in group.ranks:
            for share in group.shares:
                found += [Cell(group.depth, images, ranks, share, row) for images in group.images for row in group.rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of cifar10.npz")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of the pre-trained networks")
    arguments = parser.parse_args()
    with np.load(arguments.data / "cifar10.npz") as file:
        train, test, labels = (file[key] for key in ("x_train", "x_test", "y_test"))
    images, tests, truth = prepared(train[:6000]), prepared(test), torch.from_numpy(labels)
    done = read()
    for cell in cells():
        if any(all(row[key] == str(value) for key, value in asdict(cell).items()) for row in done):
            continue
        net = CifarResNet(cell.depth).eval()
        load_weights(net, arguments.weights / f"resnet{cell.depth}-cifar10.safetensors")
        found = run(cell, net.to(memory_format=torch.channels_last), images, tests, truth)
        done.append({key: str(value) for key, value in found.items()})
        write(done)
    fill(done)


def run(cell: Cell, net: nn.Module, images: Tensor, tests: Tensor, truth: Tensor) -> dict[str, object]:
    """Compress, and test without and with batch norm re-estimated on the same images."""
    samples = Samples(images.split(100), count=cell.images)
    rank = Uniform(cell.share) if cell.ranks == "uniform" else CostBudget(cell.ranks, cell.share)
    options = {
        "weights": {"example_input": images[:2]},
        "inputs": {"data": samples},
    }.get(cell.row, {"data": samples, "reconstruct": cell.row})
    targets = Targets(types=["Conv2d"], skip_last=False)
    small = compress(net, "svd", rank, targets, **options)
    report = summarize(net, small, images[:2], latency=False)
    errors = [row for row in getattr(small, "lowrank_pl_record")["responses"].values()]  # noqa: B009
    fresh = copy.deepcopy(small)
    reestimate_batch_norms_(fresh, samples)
    mean = lambda key: f"{np.mean([each[key] for each in errors]):.4f}" if errors else ""  # noqa: E731
    return {
        **asdict(cell),
        "accuracy": f"{accuracy(small, tests, truth):.2f}",
        "accuracy_bn": f"{accuracy(fresh, tests, truth):.2f}",
        "macs": report.compressed.macs,
        "macs_share": f"{report.compressed.macs / report.dense.macs:.4f}",
        "params": report.compressed.params,
        "params_share": f"{report.compressed.params / report.dense.params:.4f}",
        "error": mean("fitted"),
        "error_held_out": mean("held_out"),
    }


@torch.inference_mode()
def accuracy(net: nn.Module, tests: Tensor, truth: Tensor) -> float:
    """In percent."""
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(tests.split(500), truth.split(500), strict=True))
    return 100 * right / len(truth)


def prepared(images: "np.ndarray") -> Tensor:
    """[N, H, W, 3] of bytes as the networks were trained on."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    normal = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return normal.contiguous(memory_format=torch.channels_last)


def read() -> list[dict[str, str]]:
    file = HERE / "results.csv"
    return list(csv.DictReader(file.open())) if file.is_file() else []


def write(rows: list[dict[str, str]]) -> None:
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fill(rows: list[dict[str, str]]) -> None:
    """The tables of the README beside this file."""
    kinds = ("weights", "inputs", "outputs", "asymmetric", "nonlinear")
    names = {"uniform": "uniform ranks", "macs": "chosen ranks", "params": "chosen ranks, of the parameters"}
    groups: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["depth"], row["images"], row["ranks"], row["share"]), {})[row["row"]] = row
    lines = [f"| network, images | ranks | MACs | params | {' | '.join(kinds)} |", f"|---|---|{'---:|' * 7}"]
    of_errors = ["| images | row | error on them | on others | accuracy |", "|---:|---|---:|---:|---:|"]
    for (depth, images, ranks, share), cells in sorted(groups.items(), key=_in_order):
        if int(depth) == 20 and ranks == "uniform" and share == "0.5":
            of_errors += [
                f"| {images} | {kind} | {100 * float(cells[kind]['error']):.1f} % | "
                f"{100 * float(cells[kind]['error_held_out']):.1f} % | {cells[kind]['accuracy']} |"
                for kind in ("outputs", "asymmetric")
                if kind in cells
            ]
            if images != "3000":
                continue
        last = list(cells.values())[-1]
        answers = [f"{cells[k]['accuracy']} ({cells[k]['accuracy_bn']})" if k in cells else "" for k in kinds]
        shares = [f"{100 * float(last[key]):.0f} %" for key in ("macs_share", "params_share")]
        first = f"ResNet-{depth}, {int(images):,}"
        lines.append(f"| {first} | {names[ranks]} {share} | {' | '.join([*shares, *answers])} |")
    readme = (HERE / "README.md").read_text()
    before, rest = readme.split("<!-- table -->")
    words = "How far errors on the samples are from those on others (means over layers, uniform ranks at 0.5):"
    parts = ["<!-- table -->", *lines, "", words, "", *of_errors]
    (HERE / "README.md").write_text(before + "\n".join(parts) + "\n<!-- end -->" + rest.split("<!-- end -->")[1])


def _in_order(item: tuple[tuple[str, str, str, str], object]) -> tuple[int, str, str, int]:
    depth, images, ranks, share = item[0]
    return int(depth), ranks, share, int(images)


if __name__ == "__main__":
    main()
