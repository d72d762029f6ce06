"""`lowrank-pl resume`: go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

from hydra.errors import HydraException

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import build, check_parts
from lowrank_pl.cli.changes import given_keys, is_at_its_end, show, still_done
from lowrank_pl.cli.configs import change, read_stored, stored
from lowrank_pl.cli.places import check_places
from lowrank_pl.cli.schema import check_config
from lowrank_pl.cli.session import WHILE_BUILDING, WHILE_TRAINING, in_words, session
from lowrank_pl.data.downloads import no_downloads
from lowrank_pl.runs import Diverged, Run, execute
from lowrank_pl.terminal import say

_DESCRIPTION = """\
Go on with a run that was stopped, in its directory, from its newest checkpoint, as if it had not been stopped.

VALUES are overrides such as trainer.max_epochs=20, applied to the run's config.yaml; what they change is shown and
written into run.json. With them a finished run is trained on.
"""


def main() -> None:
    """Read the run's config and newest checkpoint, and end as `train` does."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("values", metavar="VALUES", nargs="*", help="overrides key=value")
    parser.add_argument("--force", action="store_true", help="go on although the model, data, method or seed are "
                        "changed, files were edited, or the training has diverged")  # fmt: skip
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help="a class or function of yours "
                        "that the config may call, such as my_package.nets.MyNet; may be repeated")  # fmt: skip
    arguments = parser.parse_intermixed_args()
    with session() as stop:
        try:
            run = Run.open(arguments.run, arguments.force)
            config = read_stored(run.directory / "config.yaml")
            changed = change(config, arguments.values, run.facts["links"])
            check_targets(config, arguments.allow)
            check_config(config)
            if not run.is_own:
                check_places(config, run.directory, given_keys(arguments.values, run.facts["links"]))
            check_parts(config)
            if not changed and is_at_its_end(run, arguments.force):
                say(f"Nothing to do: {run.directory} is finished.")
                return
            lines = show(changed, run.directory, arguments.force, config)
            downloads = run.is_own or "data.root" in given_keys(arguments.values, run.facts["links"])
            with nullcontext() if downloads else no_downloads():
                recipe = build(config, config.paths.references)
        except (*WHILE_BUILDING, HydraException) as error:
            sys.exit(f"lowrank-pl resume: {in_words(error)}")
        history = [*run.facts.get("resumed", []), {"overrides": shlex.join(arguments.values), "changed": lines}]
        facts = {"done": still_done(run.facts["done"], changed), "resumed": history}
        try:
            with run.changed(stored(config), **facts) if changed else nullcontext(), run.recorded():
                execute(run, recipe, stop, arguments.force)
        except Diverged as error:
            sys.stderr.write(f"lowrank-pl resume: {error}\n")
            sys.exit(3)
        except WHILE_TRAINING as error:
            kept = (run.directory / "config.yaml").read_text() == stored(config)
            sys.exit(f"lowrank-pl resume: {in_words(error)}" + ("" if kept else "\nThe run's config is as it was."))
