"""The figure of a run, and the chart of speed-ups."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lowrank_pl.curves import read_curves
from lowrank_pl.files import write_files
from lowrank_pl.speedups import Shape, Speedup, kernel_of, size_of


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
    _write(canvas, figure, 120)


def draw_speedups(speedups: Sequence[Speedup], title: str, figure: Path) -> None:
    """Measured against theoretical speed-up, a panel for each of the six most costly shapes of layers, a line for each
    structure, with the quartiles of what was measured; on the diagonal multiply-adds are worth what they promise."""
    shapes = list(dict.fromkeys(each.shape for each in speedups))
    shapes = sorted(shapes, key=lambda shape: -shape.macs * len(shape.names))[:_PANELS]
    shown = [each for each in speedups if each.shape in shapes]
    structures = sorted({each.structure for each in shown})
    columns = min(3, len(shapes))
    rows = math.ceil(len(shapes) / columns)
    canvas = Figure(figsize=(1.1 + 2.15 * columns, 1.3 + 2.1 * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, axes in enumerate(grid.flat):
        if i < len(shapes):
            _panel(axes, shapes[i], [each for each in shown if each.shape == shapes[i]], structures)
        else:
            axes.axis("off")
        if i + columns >= len(shapes):
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_xlabel("theoretical speed-up (multiply-adds)", fontsize=7)
        if i % columns == 0:
            axes.set_ylabel("measured speed-up", fontsize=7)
    measured = [1.0, *(each.measured for each in shown)]  # and not how far they spread
    grid[0, 0].set_ylim(min(measured) / 1.3, max(measured) * 1.3)
    canvas.suptitle(title, fontsize=8)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 2 * columns), fontsize=7,
        frameon=False, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip
    _write(canvas, figure, 200)


_PANELS = 6
_MARKERS = "osD^vPX*<>hp"


def _panel(axes: Any, shape: Shape, speedups: Sequence[Speedup], structures: Sequence[str]) -> None:
    for i, structure in enumerate(structures):
        own = sorted((each for each in speedups if each.structure == structure), key=lambda each: each.theoretical)
        if not own:
            continue
        spread = [[max(0.0, (each.measured - each.quartiles[0])) for each in own],
                  [max(0.0, (each.quartiles[1] - each.measured)) for each in own]]  # fmt: skip
        axes.errorbar(
            [each.theoretical for each in own], [each.measured for each in own], yerr=spread, label=structure,
            color=f"C{i % 10}", marker=_MARKERS[i % len(_MARKERS)], markersize=3.2, linewidth=1, elinewidth=0.7,
        )  # fmt: skip
    axes.axline((1, 1), (2, 2), color="0.5", linewidth=0.8, linestyle="--", zorder=0, label="measured = theoretical")
    axes.axhline(1, color="0.5", linewidth=0.8, zorder=0)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([2.0**k for k in range(-10, 11)]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.6)
    alike = f" and {len(shape.names) - 1} alike" if len(shape.names) > 1 else ""
    layer = shape.layer
    where = f", {size_of(layer)}" if layer.kernel else ""
    words = f"{kernel_of(layer)}, {layer.in_channels} > {layer.out_channels}{where}"
    axes.set_title(f"{shape.names[0]}{alike}\n{words}", fontsize=7)


def _write(canvas: Figure, figure: Path, dpi: int) -> None:
    image = io.BytesIO()
    canvas.savefig(image, dpi=dpi)
    write_files({figure: image.getvalue()})


_RANK = "lowrank/rank/"


def _shown(points: list[list[float]], scale: str) -> list[list[float]]:
    return [point for point in points if scale == "linear" or point[1] > 0]
