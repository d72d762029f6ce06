"""What a run's config says about it, in a few words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowrank_pl.terminal import printable

_KINDS = {
    "ADMM": "admm", "DeepTwist": "deeptwist", "LearningCompression": "lc", "compress": "direct", "OneShot": "one-shot"
}  # fmt: skip


def group_of(config: Any) -> str:
    """What it can be compared with: network and data."""
    model, data = part(config, "model", "net"), part(config, "data")
    name = _class(model)
    if "depth" in model:
        name = re.sub(r"^Cifar|$", lambda m: "" if m[0] else _word(model["depth"]), name)
    elif isinstance(model.get("name"), str):
        name = _word(model["name"])
    source = _word(Path(str(data["file"])).stem) if data.get("file") else _class(data)
    return f"{name} on {source}"


def method_of(config: Any) -> str:
    """The kind of training and what identifies it."""
    compression = part(config, "compression")
    kind = _KINDS.get(_class(compression), "none")
    if kind == "none":
        return "reference"
    structure = compression.get("method")
    if isinstance(structure, dict):
        structure = _snake(_class(structure)) if "_target_" in structure else "mixed"
    words = [*_kind_of(compression, kind), *_scratch(config, compression)]
    words += [] if kind == "admm" else [_word(structure)]  # which has one of its own
    if kind == "lc" and compression.get("lambda_") is not None:
        words.append(f"lambda={_short(compression['lambda_'])}")
    if kind == "admm":
        words += [f"{key}={_short(compression[key])}" for key in ("lambda_1", "lambda_2") if key in compression]
    for key in ("rank", "budget"):
        rule = compression.get(key)
        if isinstance(rule, dict) and "_target_" in rule:
            numbers = [_short(v) for v in rule.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
            words += [_snake(_class(rule)), *numbers[:4]]
    if kind == "deeptwist" and "S_D" in compression:
        words.append(f"S_D={_word(compression['S_D'])}")
    metric = compression.get("metric")
    if metric not in (None, "inputs" if words[0] in ("reconstruct", "one-shot") else "weights"):
        words.append(f"metric={_word(metric)}")
    return " ".join(words)


def _kind_of(compression: dict[str, Any], kind: str) -> list[str]:
    """Of what is compressed in one go: whether it is trained then, and what its factors are fitted to."""
    mode = compression.get("reconstruct")
    if kind == "one-shot":
        kind = "direct" if compression.get("train") is True else kind if mode is None else "reconstruct"
    return [kind] if mode is None else [kind, _word(mode)]


def _scratch(config: Any, compression: dict[str, Any]) -> list[str]:
    """Whether factors began with random numbers, as `OneShot.settled` says it."""
    begins = compression.get("initialize", "weights")
    if begins is None and compression.get("metric") == "weights" and not compression.get("reconstruct"):
        trained = part(config, "reference") or part(config, "model").get("weights") is not None
        begins = "weights" if trained or compression.get("recalibrate_bn") is True else "variance"
    norms = ["norms"] if compression.get("norm_between") is True else []
    return ["from scratch", *norms] if begins == "variance" else []


def part(values: Any, *keys: str) -> dict[str, Any]:
    """What lies under these keys, if it is a mapping; else an empty one."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def shortened(text: str, most: int) -> str:
    """In one line, of bounded length, without control characters."""
    text = printable(text[: most + 1])
    return text if len(text) <= most else f"{text[:most]}…"


def _word(value: Any) -> str:
    return shortened(str(value), 80)


def _class(values: dict[str, Any]) -> str:
    return _word(str(values.get("_target_", "?")).rpartition(".")[2])


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _short(number: Any) -> str:
    return f"{number:g}" if isinstance(number, (int, float)) else _word(number)
