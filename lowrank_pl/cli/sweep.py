"""`lowrank-pl sweep`: a grid of runs that can be stopped and taken up."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.foreign import check_foreign, check_overrides, composed, parsed, searching
from lowrank_pl.cli.mistakes import check_words, explain
from lowrank_pl.cli.places import check_places
from lowrank_pl.overview import gather, overview_tables
from lowrank_pl.run_files import key_of
from lowrank_pl.sweep import MOST, Sweep
from lowrank_pl.terminal import say, terminal

_DESCRIPTION = """\
Run every combination of a grid, such as

    lowrank-pl sweep compression=lc compression.lambda_=1e-3,2e-3 model=lenet300,lenet5

each in a process and a run directory of its own. The same command again skips what is finished, resumes what was
interrupted and runs what is missing. One failed job does not end the others.
"""


def main() -> None:
    """Expand the grid by Hydra's grammar and run it."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grid", metavar="KEY=VALUE[,VALUE...]", nargs="*", help="overrides of `lowrank-pl train`")
    parser.add_argument("--dir", type=Path, help="the sweep's folder (default: sweeps/<hash of the grid>)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time, threads divided")
    parser.add_argument("--extend", action="store_true", help="add this grid to the jobs that the folder holds")
    parser.add_argument("--config-name", default="train", help="passed on to `lowrank-pl train`")
    for name in ("--config-dir", "--allow"):
        parser.add_argument(name, action="append", default=[], help="the same; may be repeated")
    parser.add_argument("--trust", action="store_true", help="the same; the jobs that the folder holds are yours, too")
    given = parser.parse_intermixed_args()
    if given.jobs < 1:
        parser.error(f"expected --jobs to be 1 or more but got {given.jobs}")
    try:
        with searching([Path(folder) for folder in given.config_dir], given.trust):
            jobs = expand(given.grid, given.config_name, given.allow if given.config_dir and not given.trust else None)
            place = given.dir or Path("sweeps") / key_of(jobs)
            check = partial(check_found, name=given.config_name, allow=given.allow, directory=place)
            sweep = Sweep.open(place, jobs, given.extend, None if given.trust else check)
        code = sweep.run(given.jobs, _passed_on(given), say)
    except (ValueError, OSError, HydraException) as error:
        sys.exit(f"lowrank-pl sweep: {error}")
    entries = gather([sweep.directory])
    for entry in entries:
        entry.name = sweep.title(entry.name)
    terminal().print(overview_tables(entries))
    say(f"Everything is in {sweep.directory}")
    if code > 128:
        sys.stderr.write("Interrupted; the same command goes on with it.\n")
    sys.exit(code)


def expand(grid: list[str], name: str, allow: list[str] | None) -> list[list[str]]:
    """The jobs of a grid, each tried out on the configuration, so that a wrong name ends it before anything is run.

    Where configs may be from elsewhere, `allow` is what they may call besides the list.
    """
    try:
        overrides = parsed(grid)
    except HydraException as error:
        raise ValueError(explain(error, grid)) from error
    for override in overrides:
        if override.key_or_group.startswith("hydra"):
            raise ValueError(f"{override.input_line!r}: the sweep places its runs itself; use --dir")
    count = prod(sum(1 for _ in islice(override.sweep_iterator(), MOST + 1))
                 for override in overrides if override.is_sweep_override())  # fmt: skip
    if count > MOST:
        raise ValueError(f"expected a grid of at most {MOST:,} jobs but got more: split it")
    jobs = [list(job) for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    for job in jobs if allow is not None else ():
        check_foreign(name, job, allow or ())
    check_words(grid, name, several=True, allow=allow)
    return jobs


def check_found(job: list[str], name: str, allow: list[str], directory: Path) -> None:
    """Raise `ValueError` for a job from a manifest, which may be somebody else's, that does more than a stored config
    may."""
    check_overrides(job)
    config = composed(name, job)
    check_targets(config, allow)
    check_places(config, directory, ())


def _passed_on(given: argparse.Namespace) -> list[str]:
    """The options of `lowrank-pl train`, each with its value in one word, whatever that begins with."""
    words = [] if given.config_name == "train" else [f"--config-name={given.config_name}"]
    words += [f"--config-dir={folder}" for folder in given.config_dir]
    words += [f"--allow={allowed}" for allowed in given.allow]
    return [*words, *["--trust"] * given.trust]
