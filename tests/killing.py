"""Commands in children of a process that has imported everything, to be killed at any moment, or to be attacked."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lowrank_pl.cli.train", "lowrank_pl.cli.resume", "killing", "nets"])


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


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in two processes at once, which Lightning's `strategy="ddp"` finds to be the devices that
    it wants; what it starts by itself would import everything anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        _CONTEXT.Process(target=_work, args=(work, arguments, {**places, "LOCAL_RANK": rank, "RANK": rank}))
        for rank in ("0", "1")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def _work(work: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)


@dataclass(frozen=True)
class Outcome:
    """What became of a command. `code` is None where it was still running after the time it had."""

    code: int | None
    output: str
    seconds: float

    @property
    def is_clean(self) -> bool:
        """It ended by itself, in time, and without a trace."""
        return self.code is not None and self.code >= 0 and "Traceback (most recent call last)" not in self.output


def attack(*words: str, folder: Path, seconds: float = 10, memory: int = 2**30) -> Outcome:
    """A command that may take so long, and so many bytes more than what is imported."""
    (folder / "output.txt").unlink(missing_ok=True)
    begin = time.monotonic()
    process = _CONTEXT.Process(target=_run, args=(words, str(folder), memory))
    process.start()
    process.join(seconds)
    code, took = process.exitcode, time.monotonic() - begin
    if code is None:
        process.kill()
        process.join()
    file = folder / "output.txt"
    return Outcome(code, file.read_text(errors="replace") if file.is_file() else "", took)


def _limit(memory: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[5]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _run(words: tuple[str, ...], folder: str, memory: int | None = None) -> None:
    os.chdir(folder)
    if memory is not None:
        _limit(memory)
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
