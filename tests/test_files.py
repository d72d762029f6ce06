"""Files that are written whole or not at all."""

import os
from pathlib import Path

from lowrank_pl.files import write_files


def test_what_lies_beside_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    files = {tmp_path / "a": b"1", tmp_path / "b": b"2"}
    for path in files:
        path.write_bytes(b"0")
        for suffix in ("new", "old"):
            os.link(tmp_path / "outside", tmp_path / f".{path.name}.{os.getpid()}.{suffix}")
    write_files(files)
    assert (tmp_path / "outside").read_text() == "mine"
    assert {path: path.read_bytes() for path in files} == files
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "outside"]
