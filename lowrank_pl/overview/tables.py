"""The runs as a table: for a terminal, as CSV, as markdown."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lowrank_pl.overview.entry import Entry, front
from lowrank_pl.terminal import printable

_COLUMNS = ("run", "method", "error %", "change", "MACs", "less", "params", "less", "ms", "less")
_CSV = (
    "run", "group", "method", "status", "pareto", "error", "dense_error", "macs", "dense_macs", "params",
    "dense_params", "latency_1_ms", "dense_latency_1_ms", "latency_32_ms", "dense_latency_32_ms", "response_error",
    "command", "directory",
)  # fmt: skip
CAPTION = (
    "Test error, and its change from the dense network in points; cost of the compressed network, and how many times "
    "less than the dense one's; ms: a batch of 32 on the machine of the run, even where no difference was seen. *: no "
    "other run here has both less error and fewer MACs. lambda: loss per million units of cost, times each layer's "
    "||W||^2 unless normalize is false."
)
_RESPONSES = (
    " response %: how far a compressed layer's outputs are from the dense network's, as a share of their variance, on "
    "the kind of inputs that it was fitted to; the mean over these layers."
)


def has_responses(entries: Sequence[Entry]) -> bool:
    """Whether any run knows the errors of its layers' outputs: there is one more column then."""
    return any(entry.value("compressed", "response") is not None for entry in entries)


def columns(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The names of what `rows` gives."""
    return (*_COLUMNS, "response %") if has_responses(entries) else _COLUMNS


def caption(entries: Sequence[Entry]) -> str:
    """What the columns are."""
    return CAPTION + (_RESPONSES if has_responses(entries) else "")


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """A row for each run, in `entries`' order."""
    best, width = front(entries), len(columns(entries))
    lines = []
    for position, entry in enumerate(entries):
        error, dense = entry.value("compressed", "error"), entry.value("dense", "error")
        line = [printable(entry.name), f"{entry.method}, all dense" if entry.is_all_dense else entry.method]
        if error is None or dense is None:
            lines.append([*line, entry.problem or entry.status, *[""] * (width - 3)])
            continue
        line += [f"{error:.2f}{'*' if position in best else ' '}", f"{error - dense:+.2f}"]
        for quantity in ("macs", "params", "latency_32"):
            own, other = entry.value("compressed", quantity), entry.value("dense", quantity)
            line.append("" if own is None else f"{own:.3g}" if quantity == "latency_32" else count(own))
            even = quantity == "latency_32" and entry.is_as_fast
            line.append("" if not own or other is None else "even" if even else f"{other / own:.2f}x")
        if width > len(_COLUMNS):
            response = entry.value("compressed", "response")
            line.append("" if response is None else f"{response:.3g}")
        lines.append(line)
    return lines


def overview_tables(entries: Sequence[Entry]) -> Group:
    """For a terminal, a table for each network and data set, with what went wrong beneath it.

    Of many runs those of the front and those that went wrong are shown, and the first ones.
    """
    lines = rows(entries)
    shown = _shown(entries)
    parts: list[Table | Text] = []
    for group, places in _by_group(entries, shown).items():
        own = [(entries[i], lines[i]) for i in places]
        folder = os.path.commonpath([os.path.dirname(line[0]) for _, line in own])
        title = Text(f"{group}, in {folder}" if folder else group, style="bold")
        answers = has_responses([entry for entry, _ in own])
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", collapse_padding=answers)
        for i, name in enumerate((*_NARROW, *(["resp."] if answers else []))):
            most = 19 if answers and name == "method" else None  # the rest is for the names of runs
            justify: Literal["left", "right"] = "left" if i < 2 else "right"
            table.add_column(name, justify=justify, overflow="fold", no_wrap=i >= 2, max_width=most)
        problems = []
        for entry, line in own:
            name, result = line[0][len(folder) :].lstrip("/"), line[2]
            if entry.problem:
                problems.append(Text(f"{name}: {entry.problem}"))
                result = result if line[3] else entry.status if entry.has_failed else "see below"
            # as texts: what runs say is no markup
            numbers = (line[i] for i in (3, 4, 5, 7, 9, *([10] if answers else [])))
            table.add_row(*map(Text, (name, line[1], result, *numbers)))
        parts += [table, *problems]
    if len(shown) < len(entries):
        parts.append(Text(f"{len(shown)} of {len(entries)} runs are shown here; runs.csv and runs.html have all."))
    return Group(*parts, Text(caption(entries)))


def _by_group(entries: Sequence[Entry], places: Iterable[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i in places:
        groups.setdefault(entries[i].group, []).append(i)
    return groups


def _shown(entries: Sequence[Entry], most: int = 400) -> list[int]:
    best = front(entries)
    first = sorted(range(len(entries)), key=lambda i: (i not in best, not entries[i].problem, i))
    return sorted(first[:most])


_NARROW = ("run", "method", "error %", "change", "MACs", "MACs", "params", "ms")  # the last three: times less


def to_markdown(entries: Sequence[Entry]) -> str:
    """The same table for a page or a pull request."""
    lines, cells = [], rows(entries)
    for group, places in _by_group(entries, range(len(entries))).items():
        names = columns(entries)
        lines += [f"### {_plain(group)}", "", f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
        lines += [f"| {' | '.join(map(_plain, cells[i]))} |" for i in places]
        odd = [i for i in places if entries[i].problem and cells[i][3]]  # else it is in the row
        lines += ["", *(f"- {_plain(cells[i][0])}: {_plain(entries[i].problem)}" for i in odd)]
        lines += [""] if odd else []
    return "\n".join([*lines, caption(entries), ""])


def to_csv(entries: Sequence[Entry]) -> str:
    """All numbers in full."""
    best, text = front(entries), io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for position, entry in enumerate(entries):
        pairs = [
            entry.value(network, quantity)
            for quantity in ("error", "macs", "params", "latency_1", "latency_32")
            for network in ("compressed", "dense")
        ]
        words = [entry.name, entry.group, entry.method, entry.problem or entry.status, int(position in best)]
        pairs.append(entry.value("compressed", "response"))
        line = [*words, *("" if v is None else v for v in pairs), entry.command, str(entry.directory)]
        writer.writerow([_cell(value) if isinstance(value, str) else value for value in line])
    return text.getvalue()


def count(number: float) -> str:
    """A count in thousands or millions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"


def _plain(text: str) -> str:
    """For a cell of markdown."""
    return re.sub(r"([\\`|\[\]])", r"\\\1", text).replace("<", "&lt;")


def _cell(text: str) -> str:
    """For a cell of CSV: a spreadsheet takes what begins like this for a formula, and would compute it."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
