"""Runs killed at any moment and resumed end as the uninterrupted run does, bit by bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killing import finish, start

SMALL = [
    "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "data.augment=true", "seed=3",
]  # fmt: skip
RUNS = {
    "deeptwist": [
        *SMALL, "compression.S_D=7", "trainer.max_epochs=8", "checkpoint_every=4", "finetune=default",
        "finetune.epochs=4", "optimizer=adam",
    ],
    "lc": [
        *SMALL, "compression=lc", "compression.lambda_=3", "compression.steps=6", "compression.mu0=0.1",
        "compression.growth=2", "reference.epochs=4", "finetune=default", "finetune.epochs=3",
    ],
    "phases": [
        *SMALL, "model=lenet5", "data.size=28", "compression=direct", "decomposition=low_rank_plus_sparse", "rank.x=4",
        "reference.epochs=1", "trainer.max_epochs=1", "finetune=three_phases", "finetune.phases.convolutions.epochs=2",
        "finetune.phases.linear.epochs=1", "finetune.phases.all.epochs=1", "+trainer.limit_train_batches=4",
        "checkpoint_every=3",
    ],
}  # fmt: skip
FILES = (
    "dense.safetensors", "extracted/model.safetensors", "compressed/model.safetensors", "metrics.csv",
    "finetune/metrics.csv", "reference.safetensors", "reference/metrics.csv",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """Uninterrupted runs, and how many seconds each took."""
    done = {}
    for name, words in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        finish("train", "--help", folder=folder)  # imports
        begin = time.monotonic()
        assert finish("train", *words, "hydra.run.dir=run", folder=folder) == 0, (folder / "output.txt").read_text()
        done[name] = (folder / "run", time.monotonic() - begin)
    return done


def kill_and_resume(words: list[str], after: float, folder: Path) -> None:
    process = start("train", *words, "hydra.run.dir=run", folder=folder)
    process.join(after)
    process.kill()
    process.join()
    if not (folder / "run" / "config.yaml").is_file():  # killed before there was a run
        shutil.rmtree(folder / "run", ignore_errors=True)
        assert finish("train", *words, "hydra.run.dir=run", folder=folder) == 0
    else:
        assert finish("resume", "run", folder=folder) == 0, (folder / "output.txt").read_text()


def assert_same(run: Path, other: Path) -> None:
    for name in FILES:
        assert (run / name).is_file() == (other / name).is_file(), name
        if (run / name).is_file():
            assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert without_latency(run / "report.json") == without_latency(other / "report.json")
    assert json.loads((other / "run.json").read_text())["status"] == "finished"


def without_latency(file: Path) -> Any:
    measured = ("latency_ms", "speedup", "machine")
    hook = lambda values: {k: v for k, v in values.items() if k not in measured}  # noqa: E731
    return json.loads(file.read_text(), object_hook=hook)


@pytest.mark.parametrize("part", [0.4, 0.8])
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on(name: str, part: float, whole: dict, tmp_path: Path) -> None:
    run, seconds = whole[name]
    kill_and_resume(RUNS[name], part * seconds, tmp_path)
    assert_same(run, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RUNS)
def test_fifty_kills(name: str, whole: dict, tmp_path: Path) -> None:
    run, seconds = whole[name]
    moments = random.Random(0)
    for trial in range(25):
        folder = tmp_path / str(trial)
        folder.mkdir()
        kill_and_resume(RUNS[name], moments.uniform(0, seconds), folder)
        assert_same(run, folder / "run")
        shutil.rmtree(folder)


EXTENSION = ["trainer.max_epochs=10", "finetune.epochs=5"]


@pytest.fixture(scope="module")
def extended(whole: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run that was trained on, and how many seconds that took."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(whole["deeptwist"][0], folder / "run")
    begin = time.monotonic()
    assert finish("resume", "run", *EXTENSION, folder=folder) == 0, (folder / "output.txt").read_text()
    return folder / "run", time.monotonic() - begin


def kill_extension(whole: Path, extended: Path, after: float, folder: Path) -> str:
    """The status that the kill has left: finished as it was, or to be gone on with as it is to become."""
    run = Path(shutil.copytree(whole, folder / "run"))
    process = start("resume", "run", *EXTENSION, folder=folder)
    process.join(after)
    process.kill()
    process.join()
    status = json.loads((run / "run.json").read_text())["status"]
    assert finish("resume", "run", folder=folder) == 0, (folder / "output.txt").read_text()
    is_old = (run / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()
    assert is_old == (status == "finished" and process.exitcode != 0)
    assert_same(whole if is_old else extended, run)
    if is_old:
        assert "Nothing to do" in (folder / "output.txt").read_text()
    return status


@pytest.mark.parametrize("part", [0.2, 0.6])
def test_a_killed_extension_goes_on(part: float, whole: dict, extended: tuple, tmp_path: Path) -> None:
    kill_extension(whole["deeptwist"][0], extended[0], part * extended[1], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_killed_extensions(whole: dict, extended: tuple, tmp_path: Path) -> None:
    moments, seen = random.Random(0), set()
    for trial in range(50):
        folder = tmp_path / str(trial)
        folder.mkdir()
        seen.add(kill_extension(whole["deeptwist"][0], extended[0], moments.uniform(0, extended[1]), folder))
        shutil.rmtree(folder)
    assert {"running"} <= seen


@pytest.mark.parametrize("call", range(4))
def test_an_extension_killed_between_two_writes(call: int, whole: dict, tmp_path: Path) -> None:
    """At each of the moves by which the config and `run.json` are changed: the old run, or the new one."""
    from lowrank_pl.runs import Run

    before = Path(shutil.copytree(whole["deeptwist"][0], tmp_path / "run"))
    text = (before / "config.yaml").read_text()
    child = os.fork()
    if not child:
        done, replace = [], os.replace

        def stop(*words: Any) -> None:
            if len(done) == call:
                os._exit(9)
            done.append(words)
            replace(*words)

        os.replace = stop
        with Run.open(before).changed(text.replace("max_epochs: 8", "max_epochs: 10"), done=[]):
            os._exit(0)
    os.waitpid(child, 0)
    run = Run.open(before)
    is_old = (before / "config.yaml").read_text() == text
    assert run.facts["status"] == ("finished" if is_old else "running")
    assert run.facts["done"] == (["fit", "finetune"] if is_old else [])
    assert is_old == (call < 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(number: int, whole: dict, tmp_path: Path) -> None:
    run, _ = whole["deeptwist"]
    process = start("train", *RUNS["deeptwist"], "hydra.run.dir=run", folder=tmp_path)
    while not list((tmp_path / "run").glob("checkpoints/*.ckpt")):
        time.sleep(0.02)
        assert process.exitcode is None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run" / "report.json").exists()
    assert finish("resume", "run", folder=tmp_path) == 0
    assert_same(run, tmp_path / "run")
