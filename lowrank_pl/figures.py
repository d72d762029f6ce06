"""The figure of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure


def draw_run(metrics: Path, figure: Path) -> None:
    """Loss before and after each distortion, delta w, and validation accuracy, from a `metrics.csv`.

    The first three are Figures 3 and 4 of Lee et al. (2019). A panel without data is left out, and so is a figure
    without panels.
    """
    if not metrics.is_file():
        return
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    panels = [
        (
            "Loss at each distortion",
            {"before": "lowrank/loss_before", "after": "lowrank/loss_after"},
            "linear",
        ),
        (r"$\Delta w = ||w - \tilde w||_F^2 / N(w)$", {"": "lowrank/delta_w"}, "log"),
        ("Validation accuracy", {"": "val/accuracy"}, "linear"),
    ]
    drawn = [
        (title, {label: points for label, name in lines.items() if (points := _points(rows, name))}, scale)
        for title, lines, scale in panels
    ]
    drawn = [panel for panel in drawn if panel[1]]
    if not drawn:
        return
    canvas = Figure(figsize=(4.4 * len(drawn), 3.4), layout="constrained")
    for axes, (title, lines, scale) in zip(canvas.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, label=label)
        axes.set(title=title, xlabel="optimizer step", yscale=scale)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(frameon=False)
    canvas.savefig(figure, dpi=120)


def _points(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
