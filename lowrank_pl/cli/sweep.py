"""`lowrank-pl sweep`: a grid of runs that can be stopped and taken up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lowrank_pl.cli.mistakes import check_words, explain
from lowrank_pl.overview import gather, overview_tables
from lowrank_pl.run_files import key_of
from lowrank_pl.sweep import Sweep
from lowrank_pl.terminal import terminal

_DESCRIPTION = """\
Run every combination of a grid, such as

    lowrank-pl sweep compression=lc compression.lambda_=1e-3,2e-3 model=lenet300,lenet5

each in a process and a run directory of its own. The same command again skips what is finished, resumes what was
interrupted and runs what is missing. One failed job does not end the others.
"""


def main() -> None:
    """Expand the grid by Hydra's grammar and run it."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", metavar="KEY=VALUE[,VALUE...]", nargs="*", help="overrides of `lowrank-pl train`")
    parser.add_argument("--dir", type=Path, help="the sweep's folder (default: sweeps/<hash of the grid>)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, threads divided")
    parser.add_argument("--extend", action="store_true", help="add this grid to the jobs that the folder holds")
    for name in ("--config-dir", "--config-name", "--allow"):
        parser.add_argument(name, action="append", default=[], help="passed on to `lowrank-pl train`")
    parser.add_argument("--trust", action="store_true", help="passed on to `lowrank-pl train`")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs < 1:
        parser.error(f"expected --jobs to be 1 or more but got {arguments.jobs}")
    options = [word for name in ("config_dir", "config_name", "allow") for value in getattr(arguments, name)
               for word in (f"--{name.replace('_', '-')}", value)] + ["--trust"] * arguments.trust  # fmt: skip
    try:
        jobs = expand(arguments.grid, arguments.config_dir, (arguments.config_name or ["train"])[-1])
        sweep = Sweep.open(arguments.dir or Path("sweeps") / key_of(jobs), jobs, arguments.extend)
        code = sweep.run(arguments.jobs, options, lambda line: print(line, flush=True))  # noqa: T201
    except (ValueError, OSError, HydraException) as error:
        sys.exit(f"lowrank-pl sweep: {error}")
    entries = gather([sweep.directory])
    for entry in entries:
        entry.name = sweep.title(entry.name)
    console = terminal()
    console.print(overview_tables(entries))
    console.print(f"Everything is in {sweep.directory}", highlight=False, soft_wrap=True)
    if code > 128:
        sys.stderr.write("Interrupted; the same command goes on with it.\n")
    sys.exit(code)


def expand(grid: list[str], folders: list[str], name: str) -> list[list[str]]:
    """The jobs of a grid, each tried out on the configuration, so that a wrong name ends it before anything is run."""
    try:
        overrides = OverridesParser.create().parse_overrides(grid)
    except HydraException as error:
        raise ValueError(explain(error, grid)) from error
    for override in overrides:
        if override.key_or_group.startswith("hydra"):
            raise ValueError(f"{override.input_line!r}: the sweep places its runs itself; use --dir")
    if not folders:
        check_words(grid, name, several=True)
    jobs = [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    search = [f"hydra.searchpath=[{','.join(f'file://{Path(folder).absolute()}' for folder in folders)}]"]
    with initialize_config_module("lowrank_pl.conf", version_base="1.3"):
        for job in jobs:
            compose(name, [*job, *(search if folders else [])])
    return jobs
