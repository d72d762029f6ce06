"""Loggers beside metrics.csv: hyper-parameters, rank trajectories and the final figures, also after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
from killing import finish

TRAIN = [
    "train", "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "compression=lc", "compression.steps=3", "compression.growth=3", "compression.mu0=0.1", "compression.lambda_=3",
    "reference.epochs=1", "finetune=default", "finetune.epochs=1", "hydra.run.dir=run",
]  # fmt: skip


def train(folder: Path, *words: str) -> Path:
    assert finish(*TRAIN, *words, folder=folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


def accuracy(run: Path) -> float:
    return json.loads((run / "report.json").read_text())["compressed"]["accuracy"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tmp_path, "logger=tensorboard")
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lowrank/rank/net.fc1")
    assert scalars["lowrank/rank/net.fc1"] == [float(r) for row in rows[1:] if (r := row.split(",")[column])]
    assert scalars["final-compressed/accuracy"] == [pytest.approx(accuracy(run))]
    assert "finetune-train/loss" in scalars
    assert "lambda_: 3" in (run / "hparams.yaml").read_text()


def test_mlflow_goes_on_with_its_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = train(tmp_path, "logger=mlflow")
    assert finish("resume", "run", "finetune.epochs=2", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.tracking.MlflowClient(address)
    (experiment,) = [e for e in client.search_experiments() if e.name == "lowrank_pl"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.params["compression.lambda_"] == "3"
    assert logged.data.metrics["final-compressed/accuracy"] == pytest.approx(accuracy(run))
    assert len(client.get_metric_history(logged.info.run_id, "lowrank/rank/net.fc1")) == 3


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    run = train(tmp_path, "logger=wandb", "logger.offline=true")
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    assert list(run.glob(f"wandb/offline-run-*-{facts['logger_id']}"))
