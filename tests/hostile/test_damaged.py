"""Damaged files of runs, ways out of their directories, and what would fill the memory: refused, or made anew."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killing import attack, finish

from lowrank_pl.checksums import sum_file
from lowrank_pl.run_files import is_running
from lowrank_pl.runs import Run, checkpoints, stages_again
from lowrank_pl.runs.checkpoint_file import read_checkpoint
from lowrank_pl.runs.metrics_file import MetricsFile

HERE = Path(__file__).parent
DAMAGED: Any = yaml.safe_load((HERE / "damaged.yaml").read_text())
WAYS_OUT: Any = yaml.safe_load((HERE / "ways_out.yaml").read_text())
TRAIN = [
    "train", "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "compression.S_D=7", "trainer.max_epochs=3", "finetune=default", "finetune.epochs=2", "hydra.run.dir=run",
]  # fmt: skip
RESULTS = ("dense.safetensors", "metrics.csv", "extracted/model.safetensors", "compressed/model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and another one."""
    made = {}
    for name, words in {"whole": [], "other": ["seed=5", "trainer.max_epochs=4"]}.items():
        folder = tmp_path_factory.mktemp(name)
        assert finish(*TRAIN, *words, folder=folder) == 0, (folder / "output.txt").read_text()
        made[name] = folder / "run"
    return made


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["whole"], tmp_path / "run"))


def place(run: Path, name: str) -> Path:
    path = run / name
    return checkpoints(path.parent)[0] if path.stem == "NEWEST" else path


def damage(path: Path, way: dict[str, Any], other: Path) -> None:
    data = bytearray(path.read_bytes())
    ((kind, value),) = way.items()
    if kind == "flip":
        data[int(value * len(data))] ^= 1
    elif kind == "cut":
        del data[int(value * len(data)) :]
    elif kind == "zero":
        start = int(value * len(data))
        data[start : start + 64] = bytes(64)
    else:
        data = bytearray(other.read_bytes() if kind == "swap" else value.encode())
    assert bytes(data) != path.read_bytes()
    path.write_bytes(data)


def complaint(run: Path, file: Path, kind: str) -> str:
    """What is said when this file is read back."""
    if kind == "stages":
        return stages_again(run, ["fit", "finetune"])[1]
    with pytest.raises(ValueError) as caught:
        read_back(file, kind)
    return str(caught.value)


def read_back(file: Path, kind: str) -> None:
    if kind == "run":
        Run.open(file.parent)
    elif kind == "checkpoint":
        read_checkpoint(file)
    else:
        state = read_checkpoint(checkpoints(file.parent / "checkpoints")[0])["lowrank_pl_resumable"]
        MetricsFile(file.parent).cut(state["rows"], state["metrics"])


@pytest.mark.parametrize("way", DAMAGED["ways"], ids=str)
@pytest.mark.parametrize("entry", DAMAGED["files"], ids=lambda entry: entry["file"])
def test_a_damaged_file_is_named(entry: dict, way: dict, run: Path, runs: dict[str, Path]) -> None:
    file = place(run, entry["file"])
    if entry["read"] == "rows" and way in ({"flip": 0.99}, {"cut": 0.99}):
        pytest.skip("after the last checkpoint, where it is made anew")
    damage(file, way, place(runs["other"], entry["file"]))
    said = complaint(run, file, entry["read"])
    assert file.name in said or str(file.parent) in said or (entry["file"] == "run.json" and "config.yaml" in said)
    assert "\n" not in said


@pytest.mark.parametrize("file", ["dense.safetensors", "extracted/structure.json", "compressed/model.safetensors"])
def test_resume_makes_damaged_results_anew(file: str, run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    damage(run / file, {"flip": 0.5}, run)
    assert finish("evaluate", "run", folder=tmp_path) != 0
    assert "`lowrank-pl resume` makes it anew" in (tmp_path / "output.txt").read_text()
    assert finish("resume", "run", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    for name in RESULTS:
        assert (run / name).read_bytes() == (runs["whole"] / name).read_bytes(), name


def test_a_damaged_checkpoint_is_passed_over(run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    newest = checkpoints(run / "checkpoints")[0]
    damage(newest, {"flip": 0.5}, run)
    shutil.rmtree(run / "extracted")
    assert finish("resume", "run", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert "is damaged" in (said := (tmp_path / "output.txt").read_text())
    assert "going on from the one before" in said
    assert (run / "dense.safetensors").read_bytes() == (runs["whole"] / "dense.safetensors").read_bytes()


def test_edited_configs_are_taken_by_force(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("report_train: false", "report_train: true"))
    assert finish("resume", "run", folder=tmp_path) == 1
    assert "config.yaml is damaged or was edited" in (tmp_path / "output.txt").read_text()
    opened = Run.open(run, force=True)
    assert not opened.is_own
    opened.record()
    assert opened._lock is not None
    opened._lock.close()
    assert Run.open(run).facts["config"].keys() == {"sha256"}


def test_runs_without_sums_are_read(run: Path) -> None:
    """Of versions up to 0.2, or killed between a file and its sum."""
    for path in run.rglob("*.sha256"):
        path.unlink()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("sha256", "config")}))
    assert stages_again(run, ["fit", "finetune"]) == ([], "")
    assert read_checkpoint(checkpoints(run / "checkpoints")[0])["global_step"] > 0
    assert not Run.open(run).is_own


def test_what_killed_writers_left_is_removed(run: Path) -> None:
    left = [
        ".config.yaml.next",
        ".run.json.77.new",
        "compressed/.structure.json.77.old",
        "checkpoints/step=1.ckpt.sha256",
    ]
    for name in left:
        (run / name).write_text("{}")
    Run.open(run)
    assert not [name for name in left if (run / name).exists()]


@pytest.mark.parametrize("entry", WAYS_OUT, ids=str)
def test_a_way_out_is_refused(entry: dict, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    path = run / entry["name"]
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if "pipe" in entry:
        os.mkfifo(path)
    else:
        target = entry["link"]
        path.symlink_to(target if target.startswith(("/", "..", "figure")) else tmp_path / target)
    with pytest.raises(ValueError, match="remove it") as caught:
        Run.open(run)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="remove it"):
        Run.start(run, "", [], 0)
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert not list(outside.iterdir())
    assert not (tmp_path / "missing.txt").exists()


def test_links_that_stay_inside(run: Path, tmp_path: Path) -> None:
    (run / "best.ckpt").symlink_to(checkpoints(run / "checkpoints")[0].relative_to(run))
    (tmp_path / "named").symlink_to(run)
    assert Run.open(tmp_path / "named").is_own


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_commands_refuse_ways_out(command: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (run / "figure.png").unlink()
    (run / "figure.png").symlink_to(tmp_path / "outside.txt")
    done = attack(command, "run", folder=tmp_path, seconds=60, memory=2**32)
    assert done.is_clean
    assert done.code == 1
    assert "figure.png is a link that leads out of the run's directory" in done.output
    assert (tmp_path / "outside.txt").read_text() == "mine"


def test_hard_links_are_not_written_through(run: Path, tmp_path: Path) -> None:
    outside: dict[Path, bytes] = {}
    (tmp_path / "outside").mkdir()
    for number, path in enumerate(path for path in run.rglob("*") if path.is_file()):
        other = tmp_path / "outside" / str(number)
        os.link(path, other)
        outside[other] = path.read_bytes()
    assert finish("resume", "run", "trainer.max_epochs=4", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert {path: path.read_bytes() for path in outside} == outside


def test_a_lock_that_cannot_be_written_does_not_hinder_readers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(f"{path}")
        return original(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)  # root may write all files
    assert is_running(run) is False


# -- memory --------------------------------------------------------------------------------------------------------


class Bytes:
    def __reduce__(self) -> tuple:
        return bytearray, (2**40,)


class Blank:
    def __reduce__(self) -> tuple:
        return torch.FloatTensor, (2**36,)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


BOMBS = {
    "a tensor without strides": lambda: {"state": torch.zeros(1).expand(2**34)},
    "one that overlaps itself": lambda: {"state": torch.zeros(2**20).as_strided((2**20, 2**12), (0, 1))},
    "many views of one": lambda: {"state": [(t := torch.zeros(2**20)), *(t.view(-1) for _ in range(2000))]},
    "bytes by a number": lambda: {"state": Bytes()},
    "a tensor by a number": lambda: {"state": Blank()},
    "lists in lists": lambda: {"state": nested(60)},
    "deep lists": lambda: {"state": yaml.safe_load("[" * 150 + "]" * 150)},
    "meta": lambda: {"state": torch.empty(2**40, device="meta")},
    "sparse": lambda: {"state": torch.sparse_coo_tensor([[0]], [1.0], (2**40,))},
}


@pytest.mark.parametrize("name", BOMBS)
def test_checkpoints_do_not_grow(name: str, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "step=1.ckpt"
    torch.save(BOMBS[name](), path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_compressed_checkpoints_are_not_unpacked(tmp_path: Path) -> None:
    import zipfile

    torch.save({"state": torch.zeros(2**22)}, tmp_path / "plain.ckpt")
    path = tmp_path / "step=1.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(path)


def test_a_storage_smaller_than_it_says(tmp_path: Path) -> None:
    """The numbers that follow in the memory are none of a checkpoint."""
    import zipfile

    torch.save({"state": torch.zeros(2**16)}, tmp_path / "plain.ckpt")
    path = tmp_path / "step=1.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(path, "w") as cut:
        for part in plain.infolist():
            cut.writestr(
                part.filename, plain.read(part)[:64] if part.filename.endswith("/data/0") else plain.read(part)
            )
    with pytest.raises((ValueError, RuntimeError)):
        read_checkpoint(path)


def test_sums_are_those_of_sha256sum(run: Path) -> None:
    text = sum_file(run / "dense.safetensors").read_text()
    assert len(text.split()[0]) == 64
    assert text.split()[1:] == ["dense.safetensors"]
