"""Command lines with a mistake end at once, in one line that names it, and leave nothing behind."""

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from killing import attack, finish

CASES = yaml.safe_load(Path(__file__).with_suffix("").with_name("command_lines.yaml").read_text())
QUICK = 12  # every so manieth, which the normal suite runs


def lines() -> Iterator[tuple[list[str], str]]:
    for case in CASES["values"]:
        for value in case["values"]:
            word = str(value).lower() if isinstance(value, bool) else str(value)
            words = ["train", *case.get("with", "").split(), f"{case['key']}={word}"]
            yield words, case["key"].lstrip("+")
    for case in CASES["lines"]:
        if find_spec(case.get("absent", "none")) is None:
            yield shlex.split(case["line"]), case["says"]


ALL = list(lines())


def parameters() -> Iterator[object]:
    for index, (words, says) in enumerate(ALL):
        slow = [] if index % QUICK == 0 else [pytest.mark.slow]
        yield pytest.param(words, says, id=" ".join(words), marks=slow)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["model=lenet300", "data.size=8", "targets=all", "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
    assert finish("train", *words, "hydra.run.dir=run", folder=folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("words", "says"), list(parameters()))
def test_a_mistake_is_named(words: list[str], says: str, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    outcome = attack(*(word.replace("RUN", str(run)) for word in words), folder=tmp_path, seconds=30)
    assert outcome.is_clean, outcome.output
    assert outcome.code != 0, outcome.output
    said = outcome.output.splitlines()
    assert all(part in said[-1] for part in named(says)), outcome.output
    assert len(said) == 1 or said[0].startswith("usage: "), outcome.output
    assert [path.name for path in tmp_path.rglob("*")] == ["output.txt"]
    assert contents(run) == before


def named(says: str) -> list[str]:
    """A key may be said as `` `data`: ... `size` ``, where the class of the data speaks."""
    parts = says.split(".")
    return parts if all(part.isidentifier() for part in parts) else [says]


def test_there_are_as_many_as_promised() -> None:
    assert len(ALL) >= 350
    assert {words[0] for words, *_ in ALL} >= {
        "train",
        "resume",
        "sweep",
        "report",
        "export",
        "evaluate",
        "chart",
        "bench",
    }
