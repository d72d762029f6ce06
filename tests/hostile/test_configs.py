"""Configs, manifests and command lines from elsewhere: nothing in them runs, and nothing is written."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from killing import attack

HOOK = "{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [executed]}]}"
CASES = yaml.safe_load((Path(__file__).parent / "configs.yaml").read_text(encoding="utf-8"))


def lay_out(case: dict[str, Any], folder: Path) -> None:
    for name, text in case.get("files", {}).items():
        if isinstance(text, dict):
            text = text.get("before", "") + text["repeat"] * text["times"] + text.get("after", "")
        write(folder / name, text.replace("HOOK", HOOK).encode())
    for name, data in case.get("bytes", {}).items():
        write(folder / name, bytes.fromhex(data))
    for name, target in case.get("links", {}).items():
        (folder / name).symlink_to(target)
    for name in case.get("pipes", []):
        os.mkfifo(folder / name)


def write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def tree(folder: Path) -> dict[str, object]:
    """All names beneath a folder, and what is in the files; not what `attack` and the locks leave."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
        if path.name not in ("output.txt", ".manifest.lock")
    }


def words(case: dict[str, Any]) -> list[str]:
    return case["words"].split() if isinstance(case["words"], str) else case["words"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case["name"], marks=[pytest.mark.slow] * case.get("slow", False)) for case in CASES],
)
def test_nothing_foreign_decides(case: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    lay_out(case, folder)
    before = tree(tmp_path)
    outcome = attack(*words(case), folder=folder, seconds=30)
    assert outcome.is_clean, outcome.output
    assert tree(tmp_path) == before
    assert (outcome.code == 0) == case.get("fine", False), outcome.output
    assert case.get("says", "") in outcome.output
    assert "\x1b" not in outcome.output


def test_the_hook_would_run(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "x" / "e.yaml", f"# @package hydra.callbacks\ne: {HOOK}\n".encode())
    attack(
        "train",
        "--config-dir",
        "mine",
        "+x=e",
        "--trust",
        "data.size=8",
        "trainer.max_steps=1",
        folder=tmp_path,
        seconds=60,
    )
    assert (tmp_path / "executed").exists()
