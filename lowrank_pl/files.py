"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile


def check_folder(folder: Path) -> None:
    """Raise `OSError` where no file could be written into a folder, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    with TemporaryFile(dir=there):
        pass


def write_files(contents: dict[Path, bytes]) -> None:
    """Write all files beside their places, then move them there: whatever fails on the way, the old ones are back."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in contents}
    kept = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in contents if path.exists()}
    moved: list[Path] = []
    for leftover in (*beside.values(), *kept.values()):
        leftover.unlink(missing_ok=True)  # not written into: it may be a link
    try:
        for path, data in contents.items():
            with open(beside[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if len(contents) > 1:  # the move of a single file cannot be half done
            for path, old in kept.items():
                shutil.copy2(path, old)
        for path, new in beside.items():
            os.replace(new, path)
            moved.append(path)
    except BaseException:
        for path in moved:
            os.replace(kept[path], path) if path in kept else path.unlink()
        raise
    finally:
        for leftover in (*beside.values(), *kept.values()):
            leftover.unlink(missing_ok=True)
