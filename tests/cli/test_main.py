"""The command line from outside."""

import csv
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from killing import finish

from lowrank_pl import load_compressed
from lowrank_pl.models import LeNet300

SMALL = ["model=lenet300", "data.size=8", "targets=all", "compression.S_D=7", "trainer.max_epochs=2"]


def lowrank_pl(*arguments: str, folder: Path) -> tuple[int, str]:
    """Exit code and output."""
    return finish(*arguments, folder=folder), (folder / "output.txt").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("cli")
    code, output = lowrank_pl("train", *SMALL, folder=folder)
    assert code == 0, output
    (directory,) = (folder / "runs").iterdir()
    return directory, output


def test_a_run_leaves_everything(run: tuple[Path, str]) -> None:
    directory, _ = run
    for name in ("config.yaml", "run.json", "metrics.csv", "report.json", "report.md", "figure.png",
                 "compressed/model.safetensors", "compressed/structure.json",
                 "dense.safetensors", "checkpoints/step=11.ckpt"):  # fmt: skip
        assert (directory / name).stat().st_size > 0, name
    facts = json.loads((directory / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["seed"] == 0
    assert facts["command"] == f"lowrank-pl train {' '.join(SMALL)}"
    assert facts["versions"]["torch"] == version("torch")


def test_the_output_says_where_it_is(run: tuple[Path, str]) -> None:
    _, output = run
    said = [line.partition(" s  ")[2] for line in output.splitlines() if " s  " in line]
    stages = [text.partition(", validation accuracy")[0] for text in said]
    assert stages == [
        "training: up to epoch 2", "training: epoch 1 of 2", "training: epoch 2 of 2", "testing both networks",
        "timing both networks, layer by layer",
    ]  # fmt: skip
    assert "it/s" not in output  # no progress bar into a file


def test_the_report_agrees_with_the_network_on_disk(run: tuple[Path, str]) -> None:
    directory, output = run
    report = json.loads((directory / "report.json").read_text())
    net = load_compressed(LeNet300(input_shape=(1, 8, 8)), directory / "compressed")
    assert report["compressed"]["params"] == sum(p.numel() for p in net.parameters())
    assert report["dense"]["params"] == sum(p.numel() for p in LeNet300(input_shape=(1, 8, 8)).parameters())
    keys = {"accuracy", "params", "macs", "latency_ms", "index_bytes"}
    assert set(report["dense"]) == set(report["compressed"]) == keys
    assert report["compressed"]["macs"] < report["dense"]["macs"]
    assert f"{100 * report['compressed']['accuracy']:.2f} %" in output
    assert [layer["name"] for layer in report["layers"]] == ["fc1", "fc2", "fc3"]


def test_the_distortions_are_logged_and_the_config_is_resolved(run: tuple[Path, str]) -> None:
    directory, _ = run
    rows = list(csv.DictReader((directory / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["lowrank/delta_w"]] == [7, 14, 21, 22]  # 22: the end
    assert any(row["val/accuracy"] for row in rows)
    assert "${" not in (directory / "config.yaml").read_text()


@pytest.mark.parametrize("compression", ["none", "direct"])
def test_baselines(compression: str, tmp_path: Path) -> None:
    arguments = [*SMALL[:3], "trainer.max_epochs=1", f"compression={compression}", "trainer.max_steps=3"]
    code, output = lowrank_pl("train", *arguments, "hydra.run.dir=run", folder=tmp_path)
    assert code == 0, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    net = load_compressed(LeNet300(input_shape=(1, 8, 8)), tmp_path / "run" / "compressed")
    assert report["compressed"]["params"] == sum(p.numel() for p in net.parameters())
    assert (report["compressed"]["params"] < report["dense"]["params"]) == (compression == "direct")


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['lowrank-pl', '--help']; from lowrank_pl.cli import main; main(); "
    code += "assert not {'torch', 'hydra', 'pytorch_lightning'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "compression.SD=3"], "compression.SD"),
        (["train", "model=lenet6"], "lenet6"),
        (["train", "compression.S_D=0"], "S_D"),
        (["train", "data=arrays", "data.file=nothing.npz"], "nothing.npz"),
        (["train", "trainer.devices=2"], "trainer.devices"),
        (
            ["train", "trainer.max_epochs=two"],
            "Expected `trainer.max_epochs` to be a whole number or null but got 'two'",
        ),
        (["train", "rank.x=0"], "`rank`: Expected argument `x`"),
        (["train", "model.weights=missing.safetensors"], "missing.safetensors: set `model.weights`"),
        (["bench", "nothing"], "projection_vgg16"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = lowrank_pl(*arguments, folder=tmp_path)
    assert code != 0
    assert message in output
    assert "Traceback" not in output
    assert 'File "' not in output
