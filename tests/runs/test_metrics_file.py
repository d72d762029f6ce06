"""metrics.csv: rows, columns that come later, and what a killed run leaves."""

import csv
from pathlib import Path

import pytest
import torch

from lowrank_pl.runs.metrics_file import MetricsFile


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def logged(tmp_path: Path) -> MetricsFile:
    logger = MetricsFile(tmp_path)
    logger.cut(0)
    logger.log_metrics({"a": 1.5, "epoch": 0}, step=3)
    logger.save()
    logger.log_metrics({"b": torch.tensor(0.1)}, step=4)
    logger.log_metrics({"a": float("nan")}, step=5)
    assert logger.saved()[0] == 3
    return logger


def test_rows_and_columns_in_the_order_they_came(logged: MetricsFile, tmp_path: Path) -> None:
    assert rows(tmp_path) == [
        {"step": "3", "a": "1.5", "epoch": "0", "b": ""},
        {"step": "4", "a": "", "epoch": "", "b": str(torch.tensor(0.1).item())},
        {"step": "5", "a": "nan", "epoch": "", "b": ""},
    ]


def test_a_resumed_run_ends_with_the_same_file(logged: MetricsFile, tmp_path: Path) -> None:
    whole = (tmp_path / "metrics.csv").read_bytes()
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(b"6,9,9,9\n7,8")  # newer than the checkpoint, and half a line
    again = MetricsFile(tmp_path)
    again.cut(2)
    again.log_metrics({"a": float("nan")}, step=5)
    again.finalize("success")
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    assert again.rows == 3


def test_a_file_of_an_earlier_run_is_removed_by_a_new_one(logged: MetricsFile, tmp_path: Path) -> None:
    MetricsFile(tmp_path).cut(0)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_file_that_its_checkpoint_does_not_fit_is_refused(logged: MetricsFile, tmp_path: Path) -> None:
    rows, digest = logged.saved()
    file, whole = tmp_path / "metrics.csv", (tmp_path / "metrics.csv").read_text()
    MetricsFile(tmp_path).cut(rows, digest)  # as it is
    assert file.read_text() == whole
    for text, message in [
        ("".join(whole.splitlines(keepends=True)[:-1]), "has 2 rows"),
        ("", "has 0 rows"),
        (whole.replace("1.5", "1.6"), "has been altered"),
        (whole.replace("epoch", "epocg"), "has been altered"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{message}.* counts 3"):
            MetricsFile(tmp_path).cut(rows, digest)
        assert file.read_text() == text
    MetricsFile(tmp_path).cut(rows, digest, force=True)


def test_a_column_that_comes_later_leaves_the_digest_as_it_is(logged: MetricsFile, tmp_path: Path) -> None:
    rows, digest = logged.saved()
    logged.log_metrics({"c": 1}, step=6)
    logged.finalize("success")
    MetricsFile(tmp_path).cut(rows, digest)
