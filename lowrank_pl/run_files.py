"""What run directories say to other processes: their facts and their locks. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lowrank_pl.reading import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def read_facts(directory: Path, force: bool = False) -> dict[str, Any] | None:
    """What `run.json` says; None without one. Raises `ValueError` for one that is not what we write, or (unless
    `force`) was changed since."""
    file = directory / "run.json"
    if not file.is_file():
        return None
    facts = read_json(file)
    fields = {"status": str, "links": dict, "done": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in fields.items()):
        raise ValueError(f"{file}: expected an object with {', '.join(fields)}")
    for name, kind in {"resumed": list, "config": dict, "data": str, "error": str, "command": str}.items():
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{file}: expected `{name}` to be a {kind.__name__} but got {facts[name]!r:.100}")
    known = facts.pop("sha256", None)
    # `config` came with the sum: where only one of them is there, the other one was damaged
    if not force and (known is not None or "config" in facts) and known != _sum(facts):
        raise ValueError(
            f"{file} is damaged or was edited: its SHA-256 is not the one in it. `lowrank-pl resume --force` takes it "
            "as it is"
        )
    return facts


def facts_text(facts: dict[str, Any]) -> bytes:
    """The text of `run.json`, with its own sum as the last value."""
    return as_json({**facts, "sha256": _sum(facts)})


def _sum(facts: dict[str, Any]) -> str:
    # names that are no UTF-8 are written, and read as question marks
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode(errors="replace")).hexdigest()


def is_running(directory: Path) -> bool:
    """Whether a process works in this directory now. Needs no right to write in it."""
    try:
        with _opened(directory / _LOCK, os.O_RDONLY) as file:
            return not _try_lock(file, shared=True)
    except OSError:  # there is none, or it is a link
        return False


def check_links(directory: Path) -> None:
    """Raise `ValueError` for a directory in which something leads out of it, or is no file or folder: who writes there
    would write elsewhere, or wait for ever."""
    home = directory.resolve()
    for folder, folders, files in os.walk(directory):  # which follows no links
        if "wandb" in Path(folder).relative_to(directory).parts:
            continue  # which links to its logs elsewhere, and writes into folders that it has made
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                try:
                    target = path.resolve()
                except (OSError, RuntimeError):  # a loop
                    target = Path("/")
                if not target.is_relative_to(home) or target.is_symlink():
                    raise ValueError(f"{path} is a link that leads out of the run's directory: remove it")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is neither a file nor a folder: remove it")


def remove_leftovers(directory: Path) -> None:
    """What writers that were killed have left; for who holds the directory's lock."""
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder, name)
            half = re.fullmatch(r"\..+\.\d+\.(new|old)", name)
            lonely = name.endswith(".ckpt.sha256") and not path.with_suffix("").exists()
            if half or lonely:
                path.unlink(missing_ok=True)


def as_json(values: Any) -> bytes:
    """The text that we write into files."""
    return (json.dumps(values, indent=1) + "\n").encode()


def key_of(values: Any) -> str:
    """A short name for plain values: the same for equal ones."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


_LOCK = ".lock"


def lock(directory: Path) -> IO[bytes] | None:
    """Held until this process ends; the file alone means nothing."""
    file = _opened(directory / _LOCK, os.O_RDWR | os.O_CREAT)
    if not _try_lock(file):
        file.close()
        raise RuntimeError(f"another process works on {directory}: wait until it ends, or stop it")
    return file


@contextmanager
def locked(path: Path, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, no other process is inside with the same file; waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, os.O_RDWR | os.O_CREAT) as file:
        while not _try_lock(file):
            while_waiting()
            time.sleep(0.2)
        yield


def _opened(path: Path, flags: int) -> IO[bytes]:
    # a link may lead anywhere, and a pipe would wait for its other end
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: expected a regular file")
    return open(descriptor, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


def _try_lock(file: IO[bytes], shared: bool = False) -> bool:
    # record locks: no forked worker holds them on when this process is killed
    if fcntl is not None:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
