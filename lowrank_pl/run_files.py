"""What run directories say to other processes: their facts and their locks. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def read_facts(directory: Path) -> dict[str, Any] | None:
    """What `run.json` says; None without one. Raises `ValueError` for one that is not what we write."""
    file = directory / "run.json"
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    fields = {"status": str, "links": dict, "done": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in fields.items()):
        raise ValueError(f"{file}: expected an object with {', '.join(fields)}")
    return facts


def is_running(directory: Path) -> bool:
    """Whether a process works in this directory now."""
    if not (directory / _LOCK).is_file():
        return False
    with open(directory / _LOCK, "a") as file:
        return not _try_lock(file)


def as_json(values: Any) -> bytes:
    """The text that we write into files."""
    return (json.dumps(values, indent=1) + "\n").encode()


def key_of(values: Any) -> str:
    """A short name for plain values: the same for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


_LOCK = ".lock"


def lock(directory: Path) -> IO[str] | None:
    """Held until this process ends; the file alone means nothing."""
    file = open(directory / _LOCK, "a")  # noqa: SIM115
    if not _try_lock(file):
        file.close()
        raise RuntimeError(f"another process works on {directory}: wait until it ends, or stop it")
    return file


@contextmanager
def locked(path: Path, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, no other process is inside with the same file; waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        while not _try_lock(file):
            while_waiting()
            time.sleep(0.2)
        yield


def _try_lock(file: IO[str]) -> bool:
    # record locks: no forked worker holds them on when this process is killed
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
