"""Draw results.csv: python experiments/deeptwist_cifar10/draw.py"""

import csv
import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PAPER = {"2x": (93.34, 93.11, 93.01, 93.23), "4x": (92.94, 92.97, 93.00, 92.81)}
TILES = (64, 32, 16, 8)


def main() -> None:
    with open(HERE / "results.csv", newline="") as file:
        accuracy = {row["cell"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    canvas = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for color, ratio in zip(("C0", "C1"), ("2x", "4x"), strict=True):
        ours = [
            (i, accuracy[f"table1-tile{t}-{ratio}"])
            for i, t in enumerate(TILES)
            if f"table1-tile{t}-{ratio}" in accuracy
        ]
        left.plot(*zip(*ours, strict=True), "o-", color=color, label=f"{ratio}, 4 epochs")
        left.plot(range(4), PAPER[ratio], "s:", color=color, alpha=0.5, label=f"{ratio}, the paper, 200 epochs")
    left.axhline(92.63, color="0.5", linewidth=1, label="pre-trained")
    left.set(title="Table 1: tile size, nine layers of ResNet-32", xlabel="tile", ylabel="test accuracy, %")
    left.set_xticks(range(4), [str(tile) for tile in TILES])
    methods = ("tiled_svd", "svd", "tucker2", "tucker2-conventional")
    for i, method in enumerate(methods):
        points = [
            (int(match[1]), value)
            for cell, value in accuracy.items()
            if (match := re.fullmatch(rf"figure6-{method}-(\d)x", cell))
        ]
        if points:
            right.plot(*zip(*sorted(points), strict=True), "o-", color=f"C{i}", label=method)
    right.axhline(92.63, color="0.5", linewidth=1)
    right.set(title="Figure 6: all convolutions but the first, 2 epochs", xlabel="times fewer weights", xticks=(2, 4))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    canvas.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
