"""Whether files are still what was written: SHA-256 sums beside them, and signatures by this user. Imports nothing
heavy."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from lowrank_pl.files import write_files
from lowrank_pl.reading import read_bytes


def sum_file(path: Path) -> Path:
    """Where the sum of a file is, as `sha256sum` writes and checks it."""
    return path.with_name(f"{path.name}.sha256")


def write_summed(path: Path, data: bytes) -> None:
    """Write a file and its sum. Whenever this is killed, the file that is there has one of the sums that are there."""
    new = hashlib.sha256(data).hexdigest()
    old = _old_sum(path)
    write_files({sum_file(path): _lines(path, new, *old)})
    try:
        write_files({path: data})
    except BaseException:
        if not path.is_file():
            sum_file(path).unlink(missing_ok=True)
        raise
    if old:
        write_files({sum_file(path): _lines(path, new)})


def add_sum(path: Path) -> None:
    """Write the sum of a file that is there."""
    write_files({sum_file(path): _lines(path, sum_of(path))})


def check_sum(path: Path) -> None:
    """Raise `ValueError` for a file that is not what was written; one without a sum beside it is taken as it is."""
    try:
        known = read_bytes(sum_file(path), 4096)
    except FileNotFoundError:
        return
    if sum_of(path).encode() not in known.split():
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {sum_file(path).name}")


def sum_of(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def remove_summed(path: Path) -> None:
    """Remove a file and its sum, whatever of them is there."""
    path.unlink(missing_ok=True)
    sum_file(path).unlink(missing_ok=True)


def signature(data: bytes) -> str | None:
    """What only this user can make of the data, by a key in the user's cache folder; None where none can be kept."""
    try:
        return hmac.new(_key(), data, hashlib.sha256).hexdigest()
    except (OSError, ValueError, RuntimeError):  # no home, or one that cannot be written
        return None


def is_signed(data: bytes, by: object) -> bool:
    """Whether this is the signature of the data by this user."""
    own = signature(data)
    return own is not None and isinstance(by, str) and hmac.compare_digest(own.encode(), by.encode(errors="replace"))


def _old_sum(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [read_bytes(sum_file(path), 4096).split()[0].decode()]
    except (OSError, ValueError, IndexError):
        return [sum_of(path)]


def _lines(path: Path, *sums: str) -> bytes:
    return b"".join(b"%s  %s\n" % (each.encode(), os.fsencode(path.name)) for each in sums)


def _key() -> bytes:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_pl"
    file = home / "key"
    if not file.is_file():
        home.mkdir(parents=True, exist_ok=True)
        made = home / f".key.{os.getpid()}.new"
        made.touch(0o600)
        made.write_bytes(secrets.token_bytes(32))
        try:
            os.link(made, file)  # unlike a move, not over the key of another process that began at the same time
        except FileExistsError:
            pass
        finally:
            made.unlink(missing_ok=True)
    return read_bytes(file, 4096)
