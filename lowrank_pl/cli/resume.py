"""`lowrank-pl resume`: go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import build
from lowrank_pl.cli.configs import change, protected, read_stored, stored
from lowrank_pl.cli.reach import out_of_reach
from lowrank_pl.cli.session import WHILE_BUILDING, WHILE_TRAINING, in_words, session
from lowrank_pl.files import write_files
from lowrank_pl.runs import Run, execute
from lowrank_pl.terminal import terminal

_DESCRIPTION = """\
Go on with a run that was stopped, in its directory, from its newest checkpoint, as if it had not been stopped.

VALUES are overrides such as trainer.max_epochs=20, applied to the run's config.yaml; what they change is shown and
written into run.json. With them a finished run is trained on.
"""


def main() -> None:
    """Read the run's config and newest checkpoint, and end as `train` does."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("values", metavar="VALUES", nargs="*", help="overrides key=value")
    parser.add_argument("--force", action="store_true", help="change the model, data, method or seed all the same")
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help="a class or function of yours "
                        "that the config may call, such as my_package.nets.MyNet; may be repeated")  # fmt: skip
    arguments = parser.parse_intermixed_args()
    with session() as stop:
        try:
            run = Run.open(arguments.run)
            config = read_stored(run.directory / "config.yaml")
            changed = change(config, arguments.values, run.facts["links"])
            check_targets(config, arguments.allow)
            if not changed and run.facts["status"] == "finished":
                terminal().print(f"Nothing to do: {run.directory} is finished.", highlight=False, soft_wrap=True)
                return
            lines = _show(run, changed, arguments.force)
            recipe = build(config, config.paths.references)
        except (*WHILE_BUILDING, HydraException) as error:
            sys.exit(f"lowrank-pl resume: {in_words(error)}")
        before = {run.directory / name: (run.directory / name).read_bytes() for name in ("config.yaml", "run.json")}
        if changed:
            history = [*run.facts.get("resumed", []), {"overrides": shlex.join(arguments.values), "changed": lines}]
            run.record(done=_still_done(run, changed), status="running", resumed=history)
            write_files({run.directory / "config.yaml": stored(config).encode()})
        reached = _reached(run)
        try:
            with run.recorded():
                execute(run, recipe, stop)
        except Exception as error:
            back = bool(changed) and _reached(run) == reached  # such values never trained: the run does without them
            if back:
                write_files(before)
            if not isinstance(error, WHILE_TRAINING):
                raise
            sys.exit(f"lowrank-pl resume: {in_words(error)}" + ("\nThe run's config is as it was." if back else ""))


def _show(run: Run, changed: dict[str, tuple[Any, Any]], force: bool) -> list[str]:
    """Print what is changed; refuse what makes it another run."""
    notes = out_of_reach(changed, run.directory)
    lines = [
        f"{key}: {old} -> {new}" + (f"  ({notes[key]})" if key in notes else "") for key, (old, new) in changed.items()
    ]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if protected(changed) and not force:
        raise ValueError(
            f"{', '.join(protected(changed))}: the model, data, method and seed make the run what it is. Start another "
            "run, or add --force"
        )
    return lines


def _reached(run: Run) -> tuple[list[str], set[Path]]:
    """What the run has come to: stages and checkpoints."""
    return run.facts["done"], set(run.directory.glob("**/*.ckpt"))


def _still_done(run: Run, changed: dict[str, Any]) -> list[str]:
    """The stages that a change leaves as they are."""
    parts = {key.partition(".")[0] for key in changed} - {"report_train", "logger"}
    return [stage for stage in run.facts["done"] if not parts or (stage == "fit" and parts == {"finetune"})]
