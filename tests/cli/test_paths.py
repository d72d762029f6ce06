"""Folders with any name: umlauts, blanks, what looks like markup or an emoji."""

import json
from pathlib import Path

import pytest
from killing import finish

NAMES = ["ünïcode 日本 [bold]x", "[/nope] :bug: it's, {a}=(b)"]
SMALL = ["model=lenet300", "data.size=8", "targets=all", "compression.S_D=7", "trainer.max_steps=2"]


def run(*words: str, folder: Path) -> str:
    before = (folder / "output.txt").stat().st_size if (folder / "output.txt").is_file() else 0
    code = finish(*words, folder=folder)
    output = (folder / "output.txt").read_bytes()[before:].decode()
    assert code == 0, output
    return output


@pytest.mark.parametrize("name", NAMES)
def test_every_command_works_there_and_says_where(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    said = run("sweep", *SMALL, folder=folder)
    (sweep,) = (folder / "sweeps").iterdir()
    assert f"Everything is in {sweep}\n" in said
    assert json.loads((sweep / "0" / "run.json").read_text())["status"] == "finished"
    assert f"Everything is in {sweep / '0'}\n" in (sweep / "0" / "output.log").read_text()
    assert f"Nothing to do: {sweep / '0'} is finished.\n" in run("resume", str(sweep / "0"), folder=folder)
    assert f"The page: {sweep / 'runs.html'}\n" in run("report", str(sweep), folder=folder)
    place = sweep / "0" / "exported" / "model"
    assert f"{place}: " in run("export", str(sweep / "0"), "--to", "safetensors", folder=folder)
    assert "safetensors" in run("evaluate", str(sweep / "0"), folder=folder)


def test_a_run_and_configs_there(tmp_path: Path) -> None:
    configs = tmp_path / NAMES[0] / NAMES[1] / "conf, [a]"
    (configs / "model").mkdir(parents=True)
    (configs / "model" / "mine.yaml").write_text("net: {_target_: lowrank_pl.models.LeNet300}\nweights: null\n")
    words = ["train", "--config-dir", str(configs), *SMALL, "model=mine", "trainer.max_steps=1"]
    said = run(*words, folder=tmp_path / NAMES[0])
    (directory,) = (tmp_path / NAMES[0] / "runs").iterdir()
    assert f"Everything is in {directory}\n" in said
    assert "trainer.max_steps: 1 -> 2" in run("resume", str(directory), "trainer.max_steps=2", folder=tmp_path)
