"""`lowrank-pl resume`: go on with a run."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import build
from lowrank_pl.cli.configs import change, protected, read_stored, stored
from lowrank_pl.cli.reach import out_of_reach
from lowrank_pl.cli.session import session
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
    try:
        with session() as stop:
            run = Run.open(arguments.run)
            config = read_stored(run.directory / "config.yaml")
            changed = change(config, arguments.values, run.facts["links"])
            check_targets(config, arguments.allow)
            if changed:
                _accept(run, changed, arguments.values, arguments.force)
                write_files({run.directory / "config.yaml": stored(config).encode()})
            elif run.facts["status"] == "finished":
                terminal().print(f"Nothing to do: {run.directory} is finished.", highlight=False, soft_wrap=True)
                return
            with run.recorded():
                execute(run, build(config, config.paths.references), stop)
    except (ValueError, TypeError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"lowrank-pl resume: {error}")


def _accept(run: Run, changed: dict[str, tuple[Any, Any]], words: list[str], force: bool) -> None:
    """Show what is changed, refuse what makes it another run, and write it down."""
    notes = out_of_reach(changed, run.directory)
    lines = [
        f"{key}: {old} -> {new}" + (f"  ({notes[key]})" if key in notes else "") for key, (old, new) in changed.items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if protected(changed) and not force:
        raise ValueError(
            f"{', '.join(protected(changed))}: the model, data, method and seed make the run what it is. Start another "
            "run, or add --force"
        )
    changed_parts = {key.partition(".")[0] for key in changed}
    kept = run.facts["done"]
    if not changed_parts <= {"report_train", "logger"}:
        # fine-tuning is done again, and the training before it where it has changed
        kept = [stage for stage in kept if stage == "fit" and changed_parts <= {"finetune", "report_train", "logger"}]
    history = [*run.facts.get("resumed", []), {"overrides": shlex.join(words), "changed": lines}]
    run.record(status="running", done=kept, resumed=history)
