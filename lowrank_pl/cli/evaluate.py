"""`lowrank-pl evaluate`: every form of a run's network on the test set."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from lowrank_pl.cli.finished import Finished, is_sealed
from lowrank_pl.deployment import deploy
from lowrank_pl.evaluation import evaluate, evaluation_table, problems_of
from lowrank_pl.exporting import SUFFIXES, Runner, files_of, load_exported
from lowrank_pl.files import write_files
from lowrank_pl.reading import MEGABYTE
from lowrank_pl.run_files import as_json
from lowrank_pl.storage import load_compressed
from lowrank_pl.terminal import printable, terminal

_DESCRIPTION = """\
Test the dense network of a finished run, the compressed one, that as `deploy` makes it for single images, and what
`lowrank-pl export` has written into RUN/exported/, on all test images, and measure them side by side on this CPU.
Exits with 1 if one of them does not agree with the compressed one, or any gives NaN. The numbers are also in
RUN/evaluation.json.
"""

_RISKS = {"pt2": "a .pt2 file can run code", "openvino": "nothing bounds what an OpenVINO network takes"}


def main() -> None:
    """Load every form, test it, and print and write what came out."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run")
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help="as for `lowrank-pl resume`")
    parser.add_argument("--trust", action="store_true", help="open .pt2 and OpenVINO files of others, pickles and all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    try:
        run = Finished.open(arguments.run, arguments.allow)
        networks: dict[str, Runner] = {
            "dense": run.dense,
            "compressed": run.compressed,
            "deployed": deploy(run.compressed, run.images(1).contiguous(memory_format=run.memory_format)),
            **_exported(run, arguments.trust),
        }
        results = evaluate(networks, run.data.test_dataloader(), run.images, run.memory_format)
        terminal().print(evaluation_table(results))
        write_files({run.directory / "evaluation.json": as_json(results)})
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(printable(f"lowrank-pl evaluate: {error}"))
    problems = problems_of(results)
    if problems:
        sys.exit(f"lowrank-pl evaluate: {'; '.join(problems)}")


def _exported(run: Finished, trusted: bool) -> dict[str, Runner]:
    found: dict[str, Runner] = {}
    weights = sum(tensor.nbytes for tensor in run.dense.state_dict().values())
    most = 8 * weights + 64 * MEGABYTE  # a file larger than that is another network's
    for kind, suffix in SUFFIXES.items():
        file = run.directory / "exported" / f"model{suffix}"
        if not file.is_file():
            continue
        files = files_of(file)
        for each in files:
            if each.is_file() and each.stat().st_size > most:
                raise ValueError(f"{each}: expected at most {most / MEGABYTE:.0f} MiB: export it again")
        known = all(each.is_file() and is_sealed(each) for each in files)
        if kind != "onnx" and not (trusted or known):
            raise ValueError(
                f"{file} was not made by you here, or has changed, and {_RISKS[kind]}: export it again, or add --trust"
            )
        found[kind] = load_exported(file, most, None if known else run.images(1))
    folder = run.directory / "exported" / "model"
    if folder.is_dir():
        found["safetensors"] = load_compressed(run.dense, folder).to(memory_format=run.memory_format).eval()
    return found
