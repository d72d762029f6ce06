"""`lowrank-pl bench`: what compression costs on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowrank_pl import benchmarks
from lowrank_pl.files import check_folder
from lowrank_pl.terminal import terminal


def main() -> None:
    """Run the benchmarks and print their table; `--json FILE` also writes the numbers."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], description=main.__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(benchmarks.ALL)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="side-by-side repeats, of which the median counts")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(benchmarks.ALL))
    if unknown:
        parser.error(f"expected names from {', '.join(benchmarks.ALL)} but got {unknown[0]!r}")
    if arguments.repeats < 1:
        parser.error(f"expected --repeats to be 1 or more but got {arguments.repeats}")
    if arguments.json:
        try:  # before anything is measured
            check_folder(arguments.json.parent)
            if arguments.json.is_dir():
                raise IsADirectoryError(f"{arguments.json} is a folder")
        except OSError as error:
            parser.error(f"expected --json to be a file that can be written ({error})")
    results = benchmarks.run(arguments.names or list(benchmarks.ALL), arguments.repeats)
    terminal().print(benchmarks.table(results))
    if arguments.json:
        benchmarks.write(results, arguments.json)
