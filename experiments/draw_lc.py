"""Draw an experiment on learning-compression: python experiments/draw_lc.py experiments/lc_lenet300 [--runs runs]

Error against multiply-adds, the area of a ball being the parameters (Figure 2 of the paper), and, where the runs
themselves are at hand, the ranks over the multiply-adds (as in Figure 4) and over the C steps of one run.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Table 1 of Idelbayev & Carreira-Perpinan (CVPR 2020): MACs, parameters, test error; the reference first
PAPER = {
    "lc_lenet300": [(266_200, 266_610, 1.98), (45_330, 46_150, 1.87), (31_006, 31_826, 2.06), (24_102, 24_922, 2.39)],
    "lc_lenet5": [
        (2_293_000, 431_080, 0.55),
        (328_390, 26_855, 0.75),
        (295_970, 20_310, 0.82),
        (199_650, 19_165, 1.33),
    ],
}
NAMES = {
    "lc": "learning-compression",
    "lc_momentum": "learning-compression, momentum kept",
    "lc_lambda": "learning-compression to a lambda",
    "direct_lc_ranks": "learning-compression's ranks, trained directly",
    "greedy_energy": "greedy energy, then trained",
    # cells that differ by their learning rate, such as greedy_energy_lr_2e-2-0.14-seed0, up to the first hyphen
    "greedy_energy_lr_2e": "greedy energy, then trained at 0.02",
    "greedy_energy_spent_lr_2e": "greedy energy, all of the budget, then trained at 0.02",
    "greedy_energy_lr_1e": "greedy energy, then trained at 0.01",
    "energy_threshold_lr_2e": "energy threshold, then trained at 0.02",
    "direct_lc_ranks_lr_2e": "learning-compression's ranks, trained directly",
    "energy_threshold": "energy threshold, then trained",
    "deeptwist": "DeepTwist",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    with open(arguments.experiment / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = arguments.runs / arguments.experiment.name
    canvas = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1.3, 1, 1))
    draw_errors(left, rows, PAPER.get(arguments.experiment.name, []))
    cells = [row["cell"] for row in rows if row["cell"].startswith("lc") and "seed1" not in row["cell"]]
    cells = [cell for cell in cells if "seed2" not in cell and (runs / cell / "metrics.csv").is_file()]
    draw_ranks_over_cost(middle, runs, [row for row in rows if row["cell"] in cells and row["cell"].startswith("lc-")])
    if cells:  # the run whose ranks change most often
        draw_ranks_over_steps(right, max((runs / cell for cell in cells), key=changes))
    canvas.savefig(arguments.experiment / "figure.png", dpi=110)


def draw_errors(axes: Axes, rows: list[dict[str, str]], paper: list[tuple[int, int, float]]) -> None:
    """Seeds of one cell as their mean, with the standard error."""
    cells: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        point = (float(row["macs"]) / 1e3, 100 - float(row["accuracy"]), float(row["params"]))
        cells[row["cell"].split("-seed")[0]].append(point)
    largest = max(params for points in cells.values() for *_, params in points)
    for color, method in enumerate(dict.fromkeys(cell.split("-")[0] for cell in cells)):
        several = [points for cell, points in cells.items() if cell.split("-")[0] == method]
        means = [[statistics.mean(values) for values in zip(*points, strict=True)] for points in several]
        errors = [statistics.stdev([y for _, y, _ in p]) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in several]
        order = sorted(range(len(means)), key=lambda i: means[i][0])
        x, y, params = zip(*(means[i] for i in order), strict=True)
        axes.scatter(x, y, [20 + 280 * p / largest for p in params], color=f"C{color}", alpha=0.45)
        bars = [errors[i] for i in order]
        axes.errorbar(x, y, bars, fmt=".-", linewidth=0.8, color=f"C{color}", label=NAMES.get(method, method))
    if paper:
        x, y = [macs / 1e3 for macs, *_ in paper[1:]], [error for *_, error in paper[1:]]
        axes.plot(x, y, "kx:", linewidth=0.8, label="the paper")
        axes.axhline(paper[0][2], color="k", linewidth=0.5, linestyle=":")
    reference = sum(100 - float(row["accuracy_before_last_distortion"]) for row in rows if row["cell"][:2] == "lc")
    axes.axhline(reference / max(sum(row["cell"][:2] == "lc" for row in rows), 1), color="C0", linewidth=0.5)
    axes.set(xscale="log", xlabel="thousand multiply-adds", ylabel="test error, %", title="Error and cost")
    seen = [y for points in cells.values() for _, y, _ in points]
    if max(seen) > 5 * min(seen):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=False, fontsize=8)
    few_ticks(axes.xaxis)
    axes.grid(alpha=0.3, which="both")


def few_ticks(axis: Axis) -> None:
    """Of a logarithmic axis: numbers that begin with 1, 2, 3 or 5."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "1235" else ""))


def read_ranks(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Per layer the rank over optimizer steps."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("lowrank/mu")]
    names = [name for name in rows[0] if name.startswith("lowrank/rank/")]
    return {
        name.removeprefix("lowrank/rank/net."): [(i, float(row[name])) for i, row in enumerate(rows)] for name in names
    }


def changes(run: Path) -> int:
    return sum(a[1] != b[1] for points in read_ranks(run).values() for a, b in pairwise(points))


def draw_ranks_over_cost(axes: Axes, runs: Path, rows: list[dict[str, str]]) -> None:
    layers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        for layer, points in read_ranks(runs / row["cell"]).items():
            layers[layer].append((float(row["macs"]) / 1e3, points[-1][1]))
    for layer, points in layers.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=layer)
    axes.set(xscale="log", yscale="log", xlabel="thousand multiply-adds", ylabel="rank", title="Learned ranks")
    few_ticks(axes.xaxis)
    few_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize=8) if len(layers) <= 6 else None
    axes.grid(alpha=0.3)


def draw_ranks_over_steps(axes: Axes, run: Path) -> None:
    for layer, points in read_ranks(run).items():
        axes.step(*zip(*points, strict=True), where="post", label=layer)
    axes.set(yscale="symlog", yticks=[0, 1, 3, 10, 30, 100, 300], xlabel="C step", ylabel="rank")
    axes.set_title(f"Ranks while they are learned\n{run.name}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
    axes.legend(frameon=False, fontsize=8) if len(axes.lines) <= 6 else None
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
