"""Commands in children of a process that has imported everything, to be killed at any moment."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lowrank_pl.cli.train", "lowrank_pl.cli.resume", "killing"])


def start(*words: str, folder: Path) -> Any:
    """`lowrank-pl words` in a process of its own, whose output goes into a file of the folder."""
    process = _CONTEXT.Process(target=_run, args=(words, str(folder)))
    process.start()
    return process


def finish(*words: str, folder: Path) -> int:
    """The exit code of a command."""
    process = start(*words, folder=folder)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def _run(words: tuple[str, ...], folder: str) -> None:
    os.chdir(folder)
    out = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import torch

    from lowrank_pl.cli import main

    torch.set_num_threads(1)
    sys.argv = ["lowrank-pl", *words]
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
