"""The figure of a run."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from lowrank_pl.curves import read_curves
from lowrank_pl.files import write_files


def draw_run(metrics: Path, figure: Path) -> None:
    """Ranks and gap at each C step, or loss before and after each distortion and delta w; validation accuracy.

    From a `metrics.csv`. Losses and delta w are Figures 3 and 4 of Lee et al. (2019). A panel without data is left
    out, and so is a figure without panels. Raises `ValueError` or `OSError` for a file that cannot be read.
    """
    curves = read_curves(metrics, lambda name: name == "val/accuracy" or name.startswith("lowrank/"), most=10_000)
    ranks = {name.removeprefix(_RANK): name for name in curves if name.startswith(_RANK)}
    gap, losses = {"": "lowrank/gap"}, {"before": "lowrank/loss_before", "after": "lowrank/loss_after"}
    delta_w = {} if "lowrank/gap" in curves else {"": "lowrank/delta_w"}
    panels = [
        ("Rank of each layer", ranks, "linear"),
        (r"Gap $||W - \Theta|| / ||W||$", gap, "log"),
        ("Loss at each distortion", losses, "linear"),
        (r"$\Delta w = ||w - \tilde w||_F^2 / N(w)$", delta_w, "log"),
        ("Validation accuracy", {"": "val/accuracy"}, "linear"),
    ]
    drawn = [
        (
            title,
            {label: points for label, name in lines.items() if (points := _shown(curves.get(name, []), scale))},
            scale,
        )
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
        if 1 < len(lines) <= 12:
            axes.legend(frameon=False, fontsize="small")
    image = io.BytesIO()
    canvas.savefig(image, dpi=120)
    write_files({figure: image.getvalue()})


_RANK = "lowrank/rank/"


def _shown(points: list[list[float]], scale: str) -> list[list[float]]:
    return [point for point in points if scale == "linear" or point[1] > 0]
