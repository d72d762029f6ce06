"""`lowrank-pl chart`: what fewer multiply-adds are worth on this machine."""

from __future__ import annotations

import argparse
import inspect
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.progress import track
from rich.table import Table
from torch import nn

from lowrank_pl.cli.mistakes import check_words
from lowrank_pl.cli.session import WHILE_BUILDING, in_words
from lowrank_pl.costs.latency import device_name
from lowrank_pl.figures import draw_speedups
from lowrank_pl.files import check_folder, write_files
from lowrank_pl.speedups import Conditions, Speedup, decompositions_named, measure, pairs_of, shapes_of, to_csv
from lowrank_pl.terminal import printable, say, terminal

_DESCRIPTION = """\
Time every layer of a network as every structure over ranks, beside the dense layer and in turns with it, and chart the
measured speed-up against the theoretical one, that in multiply-adds:

  lowrank-pl chart model=resnet20
  lowrank-pl chart model=torchvision model.net.name=resnet50 --batch 8

MODEL is said as to `lowrank-pl train`. Layers of equal shape are timed once, the most costly ones first. speedups.csv
has a line for every rank (rewritten as it goes, so that what was measured is kept whatever happens), speedups.png a
panel for each of the six most costly shapes. Close what else runs on the machine.
"""

_DEFAULT = "resnet20"


def main() -> None:
    """Build the network, time its layers and write the table and the figure."""
    given = _given()
    try:
        check_folder(given.out)
        conditions = Conditions(given.batch, given.device, given.channels_last, given.seconds)
        decompositions = decompositions_named(given.structures)
        net, shape = _network(given)
        shapes = shapes_of(net, torch.randn(2, *shape), given.layers)
        pairs = pairs_of(shapes, decompositions, given.ranks)
        if not pairs:
            raise ValueError("Nothing to measure: none of the structures is for these layers at fewer multiply-adds")
        given.out.mkdir(parents=True, exist_ok=True)
    except WHILE_BUILDING as error:
        sys.exit(printable(f"lowrank-pl chart: {in_words(error)}"))
    del net
    found, reason = _measured(pairs, conditions, given)
    if found:
        draw_speedups(found, _title(given, conditions), given.out / "speedups.png")
        terminal().print(_table(found))
        say(f"The figure: {given.out / 'speedups.png'}")
    if reason:
        say(f"{reason}: {len({(each.shape, each.structure) for each in found})} of {len(pairs)} curves were measured")
    sys.exit(130 if reason == "Interrupted" else 0)


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="%(prog)s [model=MODEL] [model.net.KEY=VALUE ...] [options]",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="MODEL", help="model=..., model.net.KEY=... (default: resnet20)")
    parser.add_argument("--input", type=_numbers, metavar="C,H,W", help="one image (default: the network's own)")
    parser.add_argument(
        "--layers", type=_list, default=["*"], metavar="PATTERN,...", help="layers by name (default: *)"
    )
    parser.add_argument("--structures", type=_list, metavar="NAME,...", help="such as svd,spatial_svd (default: all)")
    parser.add_argument("--ranks", type=int, default=6, metavar="N", help="for each layer and structure (default: 6)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--channels-last", action="store_true", help="the order of memory that `train` has by default")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of timing a rank (default: 0.2)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so long, with what was measured by then")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files go (default: charts/MODEL-batchN)")
    given = parser.parse_intermixed_args()
    for name, fits in (("ranks", given.ranks >= 2), ("minutes", given.minutes is None or given.minutes > 0)):
        if not fits:
            parser.error(f"expected --{name} to be {'2 or more' if name == 'ranks' else 'above 0'} but got "
                         f"{vars(given)[name]}")  # fmt: skip
    for word in given.words:
        if not re.match(r"\+?model(=|\.net\.\w+=)", word):
            parser.error(f"expected model=MODEL and model.net.KEY=VALUE but got {word!r}")
    words = dict(word.split("=", 1) for word in given.words)
    given.name = words.get("model.net.name", words.get("model", _DEFAULT))
    given.out = (given.out or Path("charts") / f"{given.name}-batch{given.batch}").absolute()
    return given


def _network(given: argparse.Namespace) -> tuple[nn.Module, Sequence[int]]:
    """What the words ask for, and the shape of its images."""
    configs: list[DictConfig] = []
    check_words(given.words or [f"model={_DEFAULT}"], "train", check=lambda config, keys: configs.append(config))
    make: Any = instantiate(configs[0].model.net, _partial_=True, _convert_="all")
    known = inspect.signature(make.func).parameters.get("input_shape")
    shape = given.input or getattr(known, "default", inspect.Parameter.empty)
    if shape is inspect.Parameter.empty:
        raise ValueError(f"Expected --input C,H,W: {given.name} does not say how large its images are")
    try:
        torch.zeros(1, device=given.device)
    except (RuntimeError, AssertionError) as error:  # which PyTorch raises where it is built without
        raise ValueError(f"Expected --device to be one of this machine's but got {given.device!r} ({error})") from error
    net: nn.Module = make(input_shape=tuple(shape))
    return net, tuple(shape)


def _measured(
    pairs: Sequence[Any], conditions: Conditions, given: argparse.Namespace
) -> tuple[list[Speedup], str | None]:
    """What was measured, and why it ended early. The table is written after every curve."""
    found: list[Speedup] = []
    begin = time.monotonic()
    quiet = not sys.stdout.isatty()
    try:
        for shape, structure, layouts, ranks in track(
            pairs, "timing", console=terminal(), transient=True, disable=quiet
        ):
            if given.minutes is not None and time.monotonic() - begin > 60 * given.minutes:
                return found, f"Stopped after {given.minutes:g} minutes"
            if quiet:
                say(f"{time.monotonic() - begin:5.0f} s  {shape.names[0]}: {structure}")
            try:
                found += measure(shape, structure, layouts, ranks, conditions)
            except RuntimeError as error:  # too little memory, mostly
                say(f"{shape.names[0]}: {structure} could not be timed ({in_words(error)})")
            write_files({given.out / "speedups.csv": to_csv(found).encode()})
    except KeyboardInterrupt:
        return found, "Interrupted"
    return found, None


def _title(given: argparse.Namespace, conditions: Conditions) -> str:
    where = device_name(conditions.device)
    threads = torch.get_num_threads()
    if torch.device(conditions.device).type == "cpu":
        where += f", {threads} thread{'s' * (threads > 1)}"
    order = ", channels-last" if conditions.channels_last else ""
    return f"{given.name}, batch {conditions.batch}, float32{order}; {where}, PyTorch {torch.__version__}"


def _table(speedups: Sequence[Speedup]) -> Table:
    """How the structures do: what is left of the promise, and the best layer."""
    grid = Table("structure", box=box.SIMPLE_HEAD, caption="over layers and ranks; measured / theoretical speed-up")
    for column in ("ranks", "measured / theoretical", "faster than dense", "most"):
        grid.add_column(column, justify="right")
    for structure in dict.fromkeys(each.structure for each in speedups):
        own = [each for each in speedups if each.structure == structure]
        share = statistics.median(each.measured / each.theoretical for each in own)
        faster = sum(each.measured > 1 for each in own) / len(own)
        best = max(own, key=lambda each: each.measured)
        grid.add_row(structure, str(len(own)), f"{share:.2f}", f"{100 * faster:.0f} %",
                     f"{best.measured:.1f}x, {best.shape.names[0]}")  # fmt: skip
    return grid


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in _list(text)]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected three numbers such as 3,224,224 but got {text!r}")
    return numbers
