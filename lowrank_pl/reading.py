"""Files from elsewhere, read within bounds: of size, depth, and of what they expand to. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MEGABYTE = 2**20
DEPTH = 40  # of nested lists and mappings: a config of ours has 5
NODES = 200_000  # of a document, aliases counted as what they stand for


def read_bytes(path: Path, most: int = 16 * MEGABYTE) -> bytes:
    """A regular file of at most so many bytes. Raises `ValueError` for anything else, `OSError` as `open` does."""
    # a pipe would wait for a writer; a device may never end
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path}: expected a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: expected at most {most / MEGABYTE:g} MiB")
    return data


def read_text(path: Path, most: int = 16 * MEGABYTE) -> str:
    """The same as UTF-8 text."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, but byte {error.start} is none") from error


def read_json(path: Path, most: int = 16 * MEGABYTE) -> Any:
    """A JSON document of plain values. Strings are such as can be written again, integers have 64 bits or are inf."""
    try:
        text = read_text(path, most)
        values = json.loads(text)
        # without escapes of surrogates and long numbers all is plain: most files, in a fifth of the time
        return _plain(values) if re.search(r"\\u[dD]|[0-9]{19}", text) else values
    except RecursionError as error:
        raise ValueError(f"{path}: expected JSON that is not nested so deeply") from error
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path} is not JSON ({error})") from error


def read_yaml(path: Path, most: int = MEGABYTE) -> Any:
    """A YAML document of plain values, as `read_json`."""
    text = read_text(path, most)
    check_yaml(text, str(path))
    try:
        return _plain(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({first_line(error)})") from error


def check_yaml(text: str, name: str) -> None:
    """Raise `ValueError` for YAML that a parser should not be given: nested too deeply (libyaml ends the process), with
    tags, or growing out of bounds by its aliases. Looks at the events alone."""
    try:
        _check_events(yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), name)
    except (yaml.YAMLError, RecursionError) as error:
        if "flow level" in str(error):  # libyaml has a bound of its own, which it may come to first
            raise ValueError(_too_deep(name)) from error
        raise ValueError(f"{name} is not YAML ({first_line(error)})") from error


def _too_deep(name: str) -> str:
    return f"{name}: expected at most {NODES:,} values, nested at most {DEPTH} deep"


def _check_events(events: Iterable[yaml.Event], name: str) -> None:
    anchors: dict[str | None, int] = {}  # what each stands for, in nodes
    begun: list[tuple[str | None, int]] = []
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            nodes += anchors.get(event.anchor, NODES)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            anchors[anchor] = nodes - before
        elif isinstance(event, yaml.NodeEvent):
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"{name}: expected plain values but got the tag {event.tag!r}")
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, nodes))
            nodes += 1
            # until a list or mapping ends, an alias of it is in itself
            anchors[event.anchor] = 1 if isinstance(event, yaml.ScalarEvent) else NODES
        if len(begun) > DEPTH or nodes > NODES:
            raise ValueError(_too_deep(name))


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or, where it has none, its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="replace").decode()  # lone surrogates, which no file takes
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return math.inf if value > 0 else -math.inf  # `float` would raise OverflowError
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return value
