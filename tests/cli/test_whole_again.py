"""Runs that were moved, robbed of a file, or whose sweep was killed end as whole ones, or say what is missing."""

import json
import shutil
import time
from pathlib import Path

import pytest
from killing import attack, finish, start

SMALL = ["model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false"]
RUN = [
    "train", *SMALL, "compression.S_D=7", "trainer.max_epochs=4", "finetune=default", "finetune.epochs=2",
    "hydra.run.dir=run",
]  # fmt: skip
RESULTS = (
    "dense.safetensors", "metrics.csv", "extracted/model.safetensors", "compressed/model.safetensors",
    "finetune/metrics.csv",
)  # fmt: skip
PARTS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert finish(*RUN, folder=folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def assert_same(run: Path, whole: Path) -> None:
    assert status(run) == "finished"
    for name in RESULTS:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def killed(folder: Path) -> Path:
    process = start(*RUN, folder=folder)
    while not list((folder / "run").glob("finetune/checkpoints/*.ckpt")):
        time.sleep(0.02)
        assert process.exitcode is None
    process.kill()
    process.join()
    return folder / "run"


def test_moved_while_it_was_stopped(whole: Path, tmp_path: Path) -> None:
    there = Path(shutil.move(killed(tmp_path), tmp_path / "another place"))
    assert finish("resume", there.name, folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert_same(there, whole)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", ["finished", "killed"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_without_any_one_of_its_files(part: int, state: str, whole: Path, tmp_path: Path) -> None:
    run = whole if state == "finished" else killed(tmp_path)
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert len(files) > PARTS
    for name in files[part::PARTS]:
        folder = tmp_path / name.replace("/", " ")
        folder.mkdir()
        robbed = Path(shutil.copytree(run, folder / "run"))
        (robbed / name).unlink()
        done = attack("resume", "run", folder=folder, seconds=120, memory=2**32)
        assert done.is_clean, (name, done.output)
        if done.code == 0 and "Nothing to do" not in done.output:
            assert_same(robbed, whole)
        elif done.code == 0:
            assert not {name} & {*RESULTS[:1], *RESULTS[2:4]}
        else:
            assert Path(name).name in done.output.splitlines()[-1], (name, done.output)


@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.slow), ["--extend"]], ids=["again", "extended"])
def test_a_killed_sweep_loses_and_doubles_no_job(more: list[str], tmp_path: Path) -> None:
    words = [*SMALL, "compression.S_D=7", "trainer.max_epochs=30", "--dir", "sweep", "--jobs", "2"]
    process = start("sweep", *words, "seed=1,2,3", folder=tmp_path)
    while not list((tmp_path / "sweep" / "0").glob("checkpoints/*.ckpt")):
        time.sleep(0.02)
        assert process.exitcode is None
    process.kill()
    process.join()
    seeds = "seed=1,2,3,4" if more else "seed=1,2,3"
    for _ in range(3):  # at the first time, jobs of the killed one may still be ending
        done = attack("sweep", *words, *more, seeds, folder=tmp_path, seconds=200, memory=2**40)
        if done.code == 0:
            break
    assert done.code == 0, done.output
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job[-1] for job in jobs.values()] == [f"seed={seed}" for seed in range(1, 4 + len(more))]
    for name in jobs:
        run = tmp_path / "sweep" / name
        assert status(run) == "finished"
        rows = [
            line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:] if line.split(",")[-1]
        ]
        assert len(rows) == len(set(rows)) == 30
    assert sorted(path.name for path in (tmp_path / "sweep").glob("[0-9]*")) == list(jobs)
