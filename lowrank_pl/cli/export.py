"""`lowrank-pl export`: the compressed network of a run, as a file for where it is deployed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowrank_pl.cli.finished import Finished, seal
from lowrank_pl.exporting import SUFFIXES, check_finite, export, files_of
from lowrank_pl.storage import save_compressed
from lowrank_pl.terminal import printable, say

_DESCRIPTION = """\
Write the compressed network of a finished run for deployment: pt2 (torch.export), onnx and openvino (IR: an .xml and
a .bin file) run without lowrank_pl, on batches of any size, and are compared with the network on test images before
they are written; safetensors is weights and structure, for lowrank_pl.load_compressed.
"""


def main() -> None:
    """Load the run's network and write it."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run")
    parser.add_argument("--to", choices=[*SUFFIXES, "safetensors"], required=True, help="the format")
    parser.add_argument("--output", type=Path, help="the file (for safetensors: the folder); default: in RUN/exported/")
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help="as for `lowrank-pl resume`")
    arguments = parser.parse_args()
    suffix = SUFFIXES.get(arguments.to, "")
    place = arguments.output or arguments.run / "exported" / f"model{suffix}"
    if suffix and (place.is_dir() or str(arguments.output).endswith("/")):
        place = place / f"model{suffix}"
    said = ""
    try:
        if arguments.output is None:
            _check_inside(arguments.run)
        run = Finished.open(arguments.run, arguments.allow)
        if arguments.to == "safetensors":
            check_finite(run.compressed, run.images(32))
            save_compressed(run.compressed, place)
        else:
            place = place.with_suffix(suffix)
            difference = export(run.compressed, run.images(32), place)
            for file in files_of(place):
                seal(file)
            said = f", within {difference:.1g} of the network on 32 test images"
    except (ValueError, OSError, ImportError) as error:
        sys.exit(printable(f"lowrank-pl export: {error}"))
    size = sum(file.stat().st_size for file in (place.iterdir() if place.is_dir() else files_of(place)))
    say(f"{place}: {size / 1e6:.2f} MB{said}")


def _check_inside(run: Path) -> None:
    """A run's files are written into it, not where links of whoever made it lead."""
    for folder in (run / "exported", run / "exported" / "model"):
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link: expected a folder of the run. Remove it, or say where by --output")
