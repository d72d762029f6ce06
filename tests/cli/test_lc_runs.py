"""Learning-compression, its reference, its fine-tuning and its baselines from the command line."""

import csv
import json
from pathlib import Path

import pytest
import torch
from killing import finish
from safetensors.torch import load_file

from lowrank_pl import load_compressed
from lowrank_pl.models import LeNet300

SMALL = ["model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false"]
REFERENCE = ["reference.epochs=3"]
LC = ["compression=lc", "compression.steps=4", "compression.growth=3", "compression.mu0=0.1", *REFERENCE]


def train(*arguments: str, folder: Path) -> str:
    code = finish("train", *arguments, *SMALL, folder=folder)
    output = (folder / "output.txt").read_text()
    assert code == 0, output
    return output


def net(run: Path) -> torch.nn.Module:
    return load_compressed(LeNet300(input_shape=(1, 8, 8)), run / "compressed")


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lc")
    train("-m", *LC, "compression.lambda_=1,10", "finetune=default", "finetune.epochs=2", "report_train=true",
          "hydra.sweep.dir=sweep", folder=folder)  # fmt: skip
    return folder / "sweep"


def test_a_sweep_trains_one_reference_and_gives_every_run_a_copy(sweep: Path) -> None:
    (shared,) = (sweep / "references").glob("*.safetensors")
    for run in (sweep / "0", sweep / "1"):
        assert (run / "reference.safetensors").read_bytes() == shared.read_bytes()
        assert (run / "reference.safetensors").stat().st_size > 0
    assert (sweep / "0/reference/metrics.csv").is_file()
    assert not (sweep / "1/reference").exists()


def test_it_starts_from_the_reference_and_the_report_compares_with_it(sweep: Path) -> None:
    reference = LeNet300(input_shape=(1, 8, 8))
    reference.load_state_dict(load_file(sweep / "0/reference.safetensors"))
    reports = [json.loads((sweep / str(i) / "report.json").read_text()) for i in (0, 1)]
    assert reports[0]["dense"]["accuracy"] == reports[1]["dense"]["accuracy"]
    assert reports[0]["dense"]["params"] == sum(p.numel() for p in reference.parameters())
    assert reports[0]["compressed"]["macs"] > reports[1]["compressed"]["macs"]  # the larger lambda
    assert 0 < reports[0]["compressed"]["train_loss"] < 3


def test_it_takes_as_long_as_its_steps(sweep: Path) -> None:
    lines = [row for row in rows(sweep / "0/metrics.csv") if row["lowrank/mu"]]
    assert [round(float(row["lowrank/mu"]), 6) for row in lines] == [0.1, 0.3, 0.9, 2.7]
    assert [int(row["step"]) for row in lines] == [0, 11, 22, 33]  # 11 steps an epoch
    assert all(float(row["lowrank/lagrangian_after"]) <= float(row["lowrank/lagrangian_before"]) for row in lines)


def test_fine_tuning_trains_the_factors_at_fixed_ranks(sweep: Path) -> None:
    before = load_compressed(LeNet300(input_shape=(1, 8, 8)), sweep / "0/extracted").state_dict()
    after = net(sweep / "0").state_dict()
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert (sweep / "0/finetune/metrics.csv").is_file()
    assert 0 < json.loads((sweep / "0/extracted/test.json").read_text())["accuracy"] <= 1


@pytest.mark.parametrize("rank", [["rank=greedy_energy", "rank.ratio=0.4"], ["rank=energy_threshold", "rank.p=0.5"]])
def test_a_baseline_factorizes_the_trained_reference(sweep: Path, tmp_path: Path, rank: list[str]) -> None:
    train(
        "compression=direct", *rank, *REFERENCE, f"paths.references={sweep / 'references'}", "trainer.max_epochs=1",
        "hydra.run.dir=run", folder=tmp_path,
    )  # fmt: skip
    run = tmp_path / "run"
    assert (run / "reference.safetensors").read_bytes() == (sweep / "0/reference.safetensors").read_bytes()
    report = json.loads((run / "report.json").read_text())
    assert report["compressed"]["macs"] < 0.7 * report["dense"]["macs"]


def test_a_budget_and_no_compression(tmp_path: Path) -> None:
    words = [word for word in LC if word != "compression=lc"]
    train("compression=lc_budget", "compression.budget.ratio=0.3", *words, "hydra.run.dir=budget", folder=tmp_path)
    report = json.loads((tmp_path / "budget/report.json").read_text())
    assert report["compressed"]["macs"] <= 0.3 * report["dense"]["macs"]
    train("compression=none", "trainer.max_epochs=1", "hydra.run.dir=none", folder=tmp_path)
    report = json.loads((tmp_path / "none/report.json").read_text())
    assert report["compressed"]["macs"] == report["dense"]["macs"]
    assert not (tmp_path / "none/reference.safetensors").exists()
