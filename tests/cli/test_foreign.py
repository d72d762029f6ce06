"""Folders of configs given by --config-dir: what they may do, and who decides."""

from pathlib import Path

import pytest
from killing import finish

SMALL = ["train", "--config-dir", "mine", "data.size=8", "targets=all", "trainer.max_epochs=1", "compression.S_D=7"]


def write(folder: Path, name: str, text: str) -> None:
    (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "mine" / name).write_text(text)


def run(folder: Path, *words: str) -> tuple[int, str]:
    code = finish(*SMALL, "trainer.enable_progress_bar=false", *words, folder=folder)
    return code, (folder / "output.txt").read_text()


def test_options_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, "model/mine.yaml", "net: {_target_: lowrank_pl.models.LeNet300}\nweights: null\n")
    code, output = run(tmp_path, "model=mine")
    assert code == 0, output


@pytest.mark.parametrize(
    ("name", "text", "words", "message"),
    [
        (
            "model/mine.yaml",
            "net: {_target_: os.system, command: touch executed}\nweights: null\n",
            ["model=mine"],
            "os",
        ),
        (
            "model/mine.yaml",
            "net: {_target_: torch.nn.Flatten}\nweights: null\n",
            ["model=mine"],
            "--allow torch.nn.Fl",
        ),
        ("hydra/launcher/evil.yaml", "_target_: os.system\n", ["hydra/launcher=evil", "-m", "seed=1,2"], "--trust"),
        ("x/x.yaml", "# @package _global_\nhydra: {callbacks: {a: {_target_: os.system}}}\n", ["+x=x"], "--trust"),
        ("top.yaml", "defaults: [train]\nhydra: {job: {name: x}}\n", ["--config-name", "top"], "--trust"),
    ],
)
def test_others_decide_nothing(name: str, text: str, words: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path, name, text)
    code, output = run(tmp_path, *words)
    assert code != 0
    assert message in output
    assert not list(tmp_path.rglob("executed"))


def test_whoever_wrote_them_says_so(tmp_path: Path) -> None:
    write(tmp_path, "top.yaml", "defaults: [train, _self_]\ntrainer: {max_epochs: 1}\nhydra: {job: {name: x}}\n")
    write(tmp_path, "model/mine.yaml", "net: {_target_: torch.nn.Flatten}\nweights: null\n")
    code, output = run(tmp_path, "--config-name", "top", "--trust", "model=lenet300")
    assert code == 0, output
    (tmp_path / "mine" / "top.yaml").unlink()
    code, output = run(tmp_path, "model=mine", "--allow", "torch.nn.Flatten")
    assert code != 0
    assert "input_shape" in output  # it was called
