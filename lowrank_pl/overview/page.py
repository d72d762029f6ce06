"""The runs as one HTML page that needs nothing but a browser."""

from __future__ import annotations

import csv
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any
from zlib import compress

from lowrank_pl.overview.entry import Entry, front
from lowrank_pl.overview.read import DETAILED, RANK
from lowrank_pl.overview.tables import caption, columns, rows
from lowrank_pl.reading import MEGABYTE
from lowrank_pl.terminal import printable

_QUANTITIES = ("error", "macs", "params", "latency_1", "latency_32")
_CURVES = {
    "lowrank/loss_before": "before", "lowrank/loss_after": "after", "lowrank/delta_w": "delta_w", "lowrank/gap": "gap",
    "lowrank/mu": "mu", "val/accuracy": "val", "train/loss": "loss",
}  # fmt: skip
_BRIEF = f" Of more than {DETAILED} runs, curves, layers and configs are left out: report on fewer to see them."


def page(entries: Sequence[Entry]) -> str:
    """Self-contained: data, style and script are in it. Whatever the runs say is shown as text, never as markup."""
    data = {"runs": [_run(entry) for entry in entries], "published": _published({entry.group for entry in entries})}
    # deflated, so that hundreds of runs stay a small page; no letter of it can end the script element
    packed = b64encode(compress(_json(data).encode(), 6)).decode()
    parts = files("lowrank_pl.overview")
    html = parts.joinpath("page.html").read_text("utf-8")
    for place, text in (
        ("STYLE", parts.joinpath("page.css").read_text("utf-8")),
        ("SCRIPT", parts.joinpath("page.js").read_text("utf-8")),
        ("HEAD", "".join(f"<th>{escape(name)}</th>" for name in columns(entries))),
        ("TABLE", _table(entries)),
        ("CAPTION", escape(caption(entries) + (_BRIEF if len(entries) > DETAILED else ""))),
        ("DATA", packed),
    ):
        html = html.replace(f"<!-- {place} -->", text)
    return html


def _table(entries: Sequence[Entry]) -> str:
    lines, group, best, width = [], None, front(entries), len(columns(entries))
    for position, (entry, row) in enumerate(zip(entries, rows(entries), strict=True)):
        if entry.group != group:
            group = entry.group
            lines.append(
                f'<tr class="group" data-group="{escape(group)}"><th colspan="{width}">{escape(group)}</th></tr>'
            )
        name, method, *cells = (escape(cell) for cell in row)
        marked = ' class="best"' if position in best else ""
        inner = f'<td><a href="#run{position}">{name}</a></td>'
        if not row[3]:  # no results, but a word on why
            inner += f'<td>{method}</td><td class="problem" colspan="{width - 2}">{cells[0]}</td>'
        else:
            problem = f'<div class="small">{escape(entry.problem)}</div>' if entry.problem else ""
            inner += f"<td>{method}{problem}</td>" + "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr{marked} data-run="{position}" data-group="{escape(group)}">{inner}</tr>')
    return "\n".join(lines)


def _run(entry: Entry) -> dict[str, Any]:
    """What the page shows of a run, in plain values."""
    values = {network: {q: _round(entry.value(network, q)) for q in _QUANTITIES} for network in ("dense", "compressed")}
    curves = {short: _points(entry.curves[name]) for name, short in _CURVES.items() if name in entry.curves}
    ranks = {name.removeprefix(RANK): _points(points) for name, points in entry.curves.items() if name.startswith(RANK)}
    details = {"config": entry.text, "curves": curves, "ranks": ranks, "layers": entry.layers}
    if len(_json(details)) > MEGABYTE:
        details = {"config": "too long for this page", "curves": {}, "ranks": {}, "layers": []}
    return {
        "name": printable(entry.name),
        "group": entry.group,
        "method": entry.method,
        "status": entry.problem or entry.status + (", every layer stayed dense" if entry.is_all_dense else ""),
        "command": entry.command,
        "directory": printable(str(entry.directory)),
        **values,
        **details,
    }


def _json(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), allow_nan=False)  # of NaN a browser makes nothing


def _published(groups: set[str]) -> list[dict[str, Any]]:
    """The papers' points for the networks and data sets at hand: multiply-adds of the whole network for one image, all
    parameters, error in percent. Where a paper counts otherwise, tests/overview/test_published.py says how it was
    converted."""
    names = {group.casefold(): group for group in groups}
    with files("lowrank_pl.overview").joinpath("published.csv").open(encoding="utf-8") as lines:
        return [
            {
                "group": names[row["group"].casefold()],
                "label": f"{row['label']} ({row['source']})",
                **{q: float(row[q]) if row[q] else None for q in ("macs", "params", "error")},
            }
            for row in csv.DictReader(lines)
            if row["group"].casefold() in names
        ]


def _points(points: list[list[float]]) -> list[list[float]]:
    return [[int(step), float(f"{value:.4g}")] for step, value in points]


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
