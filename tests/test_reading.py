"""Files from elsewhere: what is no plain document within bounds is refused, quickly and by name."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_pl.reading import DEPTH, NODES, check_yaml, read_bytes, read_json, read_text, read_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "deep"),
        (b"a: " + b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested at most"),
        (b"a: !!bool foo", "tag"),
        (b"a: !!python/object/apply:os.system [ls]", "tag"),
        (b"!!set {a}", "tag"),
        (BOMB.encode(), "at most 200,000 values"),
        (b"a: &a [*a]", "at most"),
        (b"a: &a {b: *a}", "at most"),
        (b"a: *b", "at most|undefined"),
        (b"- 1\n" * (NODES + 1), "at most 200,000 values"),
        (b"a: [1", "is not YAML"),
        (b"2001-99-99", "is not YAML"),
        (b"{a: b}: 1", "is not YAML"),
        (b"\xff\xfea", "UTF-8"),
        (b"a: " + b"1" * 2**20, "at most 1 MiB"),
    ],
)
def test_yaml_that_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["a: 1", "[]", "a: {b: [1, 2.5, null, true, x y]}", "a: &a [1]\nb: *a", "", "a: 'ü'"])
def test_yaml_that_is_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    check_yaml(text, "name")
    assert read_yaml(tmp_path / "file") == yaml.safe_load(text)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"[1" * 3000 + b"]" * 3000, b"", b"\xff", b"1" * 5000])
def test_json_that_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "file")):
        read_json(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null, true, "ü"]}', {"a": [1, 2.5, None, True, "ü"]}),
        ('"\\ud800x"', "?x"),
        ('{"\\ud800": 1}', {"?": 1}),
        ("9" * 400, math.inf),
        (f"[-{'9' * 400}]", [-math.inf]),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_json_that_is_read_can_be_written(text: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert read_json(tmp_path / "file") == value
    json.dumps(value, ensure_ascii=False).encode()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"expected a regular file"):
            read_bytes(path)
    for path in (tmp_path / "dangling", tmp_path / "loop", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read_text(path)
