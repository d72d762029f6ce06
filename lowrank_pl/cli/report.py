"""`lowrank-pl report`: any number of runs in one table and one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowrank_pl.files import check_folder, write_files
from lowrank_pl.overview import gather, overview_tables, page, to_csv, to_markdown
from lowrank_pl.terminal import printable, say, terminal

_DESCRIPTION = """\
Gather all runs in these folders (sweeps, runs/, single runs) into a table here, and into runs.csv, runs.md and
runs.html: a page that opens without a network, with error against cost, ranks, spectra and curves of every run.
"""


def main() -> None:
    """Read the runs and write the tables and the page."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="folders that hold runs, at any depth")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the files go (default: the first folder)")
    arguments = parser.parse_args()
    try:
        entries = gather(arguments.folders)
    except FileNotFoundError as error:
        sys.exit(printable(f"lowrank-pl report: {error}"))
    if not entries:
        folders = ", ".join(map(str, arguments.folders))
        sys.exit(printable(f"lowrank-pl report: no run (a folder with run.json) in {folders}"))
    output = (arguments.output or arguments.folders[0]).absolute()
    try:
        check_folder(output)
    except OSError as error:
        sys.exit(printable(f"lowrank-pl report: {error}; --output DIR writes elsewhere"))
    terminal().print(overview_tables(entries))
    texts = {"runs.csv": to_csv(entries), "runs.md": to_markdown(entries), "runs.html": page(entries)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_files({output / name: text.encode() for name, text in texts.items()})
    except OSError as error:
        sys.exit(printable(f"lowrank-pl report: {error}; --output DIR writes elsewhere"))
    say(f"The page: {output / 'runs.html'}")
