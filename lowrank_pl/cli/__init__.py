"""The command line. Starts without PyTorch and Hydra: each command is imported when it is called."""

import os
import signal
import sys
from importlib import import_module
from types import FrameType

_COMMANDS = {
    "train": "train a network, compress it, extract and test it",
    "resume": "go on with a run that was stopped, or train it on",
    "sweep": "run a grid of runs, and go on with it",
    "report": "gather runs into one table and one page",
    "export": "write the compressed network of a run as pt2, ONNX or safetensors",
    "evaluate": "test every form of a run's network",
    "chart": "time every layer of a network as every structure over ranks",
    "bench": "measure what compression costs on this machine",
}
_USAGE = """\
usage: lowrank-pl COMMAND [arguments]

Low-rank compression of neural networks while they train.

commands:
{commands}

`lowrank-pl COMMAND --help` says more. Without arguments, `lowrank-pl train` compresses a ResNet-20 on
scikit-learn's digits in about a minute.
"""


def main() -> None:
    """The console script `lowrank-pl`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:10}{text}" for name, text in _COMMANDS.items())
        sys.stdout.write(_USAGE.format(commands=commands))
        return
    command, *rest = arguments
    if command not in _COMMANDS:
        sys.exit(f"lowrank-pl: unknown command {command!r}; expected one of {', '.join(_COMMANDS)}")
    sys.argv = [f"lowrank-pl {command}", *rest]
    before = signal.signal(signal.SIGINT, _end)  # imports may swallow a KeyboardInterrupt
    run = import_module(f"lowrank_pl.cli.{command}").main
    signal.signal(signal.SIGINT, before)
    try:
        run()
    except KeyboardInterrupt:  # before there is a run, which says how to go on with it
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


def _end(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("Interrupted.\n")
    sys.stderr.flush()
    os._exit(128 + number)
