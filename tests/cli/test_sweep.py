"""`lowrank-pl sweep`: a grid that is stopped, taken up, extended."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from killing import Outcome, attack

from lowrank_pl.sweep import Sweep, quoted

LC = [
    "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "compression=lc", "compression.steps=4",
    "compression.growth=3", "compression.mu0=0.1", "reference.epochs=3", "trainer.enable_progress_bar=false",
]  # fmt: skip
GRID = [*LC, "compression.lambda_=1,10"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lowrank_pl.cli", "sweep", *words]


def sweep(*words: str, folder: Path) -> Outcome:
    return attack("sweep", *words, folder=folder, seconds=300, memory=2**40)


def stages(text: str) -> list[tuple[str, str]]:
    """Which job starts, resumes or ends how: [("0", "starts"), ...]"""
    lines = [line for line in text.splitlines() if line.startswith("[")]
    return [(line[1 : line.index("]")], line.rpartition(": ")[2]) for line in lines]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sweep")
    result = sweep(*GRID, folder=folder)
    assert result.code == 0, result.output
    return folder, result.output


def test_a_grid_is_run_once_with_one_reference(done: tuple[Path, str]) -> None:
    folder, out = done
    assert stages(out) == [("0", "starts"), ("0", "finished"), ("1", "starts"), ("1", "finished")]
    assert "[0] lambda_=1: finished" in out
    assert "lc svd lambda=10" in out
    (directory,) = (folder / "sweeps").iterdir()
    (shared,) = (directory / "references").glob("*.safetensors")
    for name in ("0", "1"):
        assert json.loads((directory / name / "run.json").read_text())["status"] == "finished"
        assert (directory / name / "reference.safetensors").read_bytes() == shared.read_bytes()
    assert not (directory / "1" / "reference").exists()  # trained once
    again = sweep(*GRID, folder=folder)
    assert again.code == 0
    assert stages(again.output) == [("0", "finished"), ("1", "finished")]


def test_another_grid_is_refused_or_added(done: tuple[Path, str]) -> None:
    folder, _ = done
    (directory,) = (folder / "sweeps").iterdir()
    manifest = (directory / "sweep.json").read_bytes()
    wider = [*LC, "compression.lambda_=1,3"]
    refused = sweep(*wider, "--dir", str(directory), folder=folder)
    assert refused.code != 0
    assert "holds another grid, of 2 jobs: 1 of these 2" in refused.output
    assert (directory / "sweep.json").read_bytes() == manifest
    extended = sweep(*wider, "--dir", str(directory), "--extend", folder=folder)
    assert extended.code == 0, extended.output
    assert stages(extended.output) == [("0", "finished"), ("1", "finished"), ("2", "starts"), ("2", "finished")]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_goes_on(number: int, tmp_path: Path) -> None:
    words = [*LC, "compression.lambda_=1,10", "compression.l_step_epochs=5", "--dir", "sweep"]
    with subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "sweep" / "0").glob("checkpoints/*.ckpt")):
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(number)
        code = process.wait(60)
    assert code == (128 + number if number == signal.SIGINT else -number)
    state = Sweep.open(tmp_path / "sweep", list(Sweep.open(tmp_path / "sweep", [], extend=True).jobs.values()))
    for _ in range(600):  # where the sweep was killed, its job saves and ends by itself
        if state.status("0") == "interrupted":
            break
        time.sleep(0.1)
    assert state.status("0") == "interrupted"
    assert state.status("1") == "missing"
    again = sweep(*words, folder=tmp_path)
    assert again.code == 0, again.output
    assert stages(again.output) == [("0", "resumes"), ("0", "finished"), ("1", "starts"), ("1", "finished")]


def test_one_failure_does_not_end_the_others_and_jobs_run_side_by_side(tmp_path: Path) -> None:
    words = [*LC[:4], "trainer.max_epochs=2", "data.val_fraction=0.00001,0.1"]
    words += ["--jobs", "2", "--dir", "a folder, with 'signs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    result = subprocess.run(
        command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert result.returncode == 1
    said = stages(result.stdout)
    assert said[:2] == [("0", "starts"), ("1", "starts")]
    assert ("1", "finished") in said
    text = "failed: lowrank-pl train: `val_fraction` 1e-05 of 1437 training images leaves one of the sets empty, see"
    assert text in result.stdout
    directory = tmp_path / "a folder, with 'signs"
    assert "val_fraction" in (directory / "0" / "output.log").read_text()
    threads = json.loads((directory / "1" / "run.json").read_text())["threads"]
    assert threads == 2


def ended(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a sweep of one job says whose process runs this code."""
    monkeypatch.setattr("lowrank_pl.sweep.command", lambda *words: [sys.executable, "-c", code])
    said: list[str] = []
    assert Sweep.open(folder, [["seed=1"]]).run(1, [], said.append) != 0
    return said


def test_a_job_that_ends_before_it_is_a_run_has_failed_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Sweep.open(tmp_path, [["seed=1"]]).status("0") == "missing"
    for code, reason in (
        ("raise ValueError('first')", "ValueError: first"),
        ("print('a\\nError: b\\n\\nSet the environment variable HYDRA_FULL_ERROR=1'); raise SystemExit(1)", "Error: b"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
    ):
        said = ended(tmp_path, code, monkeypatch)
        assert said == ["[0] seed=1: starts", f"[0] seed=1: failed: {reason}, see {tmp_path / '0' / 'output.log'}"]
        assert Sweep.open(tmp_path, [["seed=1"]]).status("0") == "failed"


def test_a_run_that_cannot_be_resumed_has_failed_whatever_it_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.json").write_text(json.dumps({"status": "interrupted", "links": {}, "done": []}))
    (tmp_path / "0" / "config.yaml").write_text("seed: 1")
    said = ended(tmp_path, "raise SystemExit('lowrank-pl resume: no data')", monkeypatch)
    assert said[0] == "[0] seed=1: resumes"
    assert said[1].startswith("[0] seed=1: failed: lowrank-pl resume: no data, see")
    assert ended(tmp_path, "raise SystemExit(143)", monkeypatch)[1] == "[0] seed=1: interrupted"


def test_what_a_job_is_given_when_it_starts_and_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr("lowrank_pl.sweep.command", lambda *words: given.append(words) or [sys.executable, "-c", ""])
    options = ["--config-dir=conf", "--allow=a.b", "--allow=c", "--trust"]
    Sweep.open(tmp_path, [["seed=1"]]).run(1, options, lambda line: None)
    (tmp_path / "0" / "config.yaml").write_text("seed: 1")
    Sweep.open(tmp_path, [["seed=1"]]).run(1, options, lambda line: None)
    assert given[0][:6] == ("train", *options, "seed=1")
    assert given[1] == ("resume", str(tmp_path / "0"), "--allow=a.b", "--allow=c")


def test_a_job_that_is_stopped_before_it_is_a_run_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    said = ended(tmp_path, "import time; time.sleep(60)", monkeypatch)
    assert said == ["[0] seed=1: starts", "[0] seed=1: interrupted"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compression.lambda=1,2", "compression=lc"], "compression.lambda"),
        (["model=lenet301,lenet5"], "lenet301"),
        (["hydra.sweep.dir=x", "seed=1,2"], "--dir"),
        (["seed=1,2", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_grids_run_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    outcome = attack("sweep", *words, folder=tmp_path, seconds=60)
    assert outcome.code not in (0, None)
    assert outcome.is_clean
    assert message in outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"jobs": {"../x": ["a"]}}', '{"jobs": {"0": "rm"}}', '{"jobs": {"1": []}}']
)
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json: expected jobs"):
        Sweep.open(tmp_path, [["seed=1"]])
    assert (tmp_path / "sweep.json").read_text() == text


def extend(folder: Path, seed: int, barrier: Any) -> None:
    barrier.wait(60)
    Sweep.open(folder, [[f"seed={seed}"]], extend=True)


@pytest.mark.parametrize("words", [["seed=range(10001)"], ["seed=range(200)", "rank.x=range(1,100)"]])
def test_a_grid_that_nobody_means_is_refused_at_once(words: list[str], tmp_path: Path) -> None:
    outcome = attack("sweep", *words, folder=tmp_path, seconds=20)
    assert (outcome.code, outcome.is_clean) == (1, True)
    assert outcome.output == "lowrank-pl sweep: expected a grid of at most 10,000 jobs but got more: split it\n"


def test_a_manifest_of_too_many_jobs_is_refused_before_they_are_composed(tmp_path: Path) -> None:
    jobs = {str(number): [f"seed={number}"] for number in range(10_001)}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    before = time.monotonic()
    with pytest.raises(ValueError, match=r"sweep\.json: expected at most 10,000 jobs but got 10,001"):
        Sweep.open(tmp_path, [["seed=1"]], extend=True, check=lambda job: pytest.fail("composed"))
    assert time.monotonic() - before < 5


def test_a_log_that_is_a_hard_link_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    os.link(tmp_path / "outside.txt", tmp_path / "0" / "output.log")
    ended(tmp_path, "raise SystemExit('said')", monkeypatch)
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert (tmp_path / "0" / "output.log").read_text() == "said\n"


def test_two_that_extend_a_sweep_at_once_lose_no_job(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for trial in range(20):
        barrier = context.Barrier(2)
        both = [context.Process(target=extend, args=(tmp_path / str(trial), seed, barrier)) for seed in (1, 2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
            assert process.exitcode == 0
        found = Sweep.open(tmp_path / str(trial), [], extend=True).jobs.values()
        assert sorted(found) == [["seed=1"], ["seed=2"]]


def test_jobs_that_only_the_manifest_has_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    def check(job: list[str]) -> None:
        raise ValueError(f"not {job}")

    Sweep.open(tmp_path, [["seed=1"]])
    before = (tmp_path / "sweep.json").read_bytes()
    assert Sweep.open(tmp_path, [["seed=1"]], check=check).jobs == {"0": ["seed=1"]}
    with pytest.raises(ValueError, match=r"sweep\.json: not \['seed=1'\]"):
        Sweep.open(tmp_path, [["seed=2"]], extend=True, check=check)
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_quoting_is_hydras() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("a b", "a,b", "it's", "x=y", "{a}", "C:\\d\\", "/ü/日本", "[b]x[/b]"):
        (override,) = OverridesParser.create().parse_overrides([f"key={quoted(text)}"])
        assert override.value() == text
