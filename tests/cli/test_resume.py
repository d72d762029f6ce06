"""`lowrank-pl resume`: what goes on, what is refused, what survives."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import finish, start
from omegaconf import OmegaConf

from lowrank_pl.cli.changes import show

TRAIN = [
    "train", "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "trainer.max_epochs=4", "compression.S_D=7",
]  # fmt: skip


def interrupted(folder: Path, *words: str) -> Path:
    """A run in folder/run that was stopped in its first epochs."""
    process = start(*TRAIN, "trainer.max_epochs=200", *words, "hydra.run.dir=run", folder=folder)
    while len(kept_checkpoints(folder / "run")) < 2:
        time.sleep(0.02)
        assert process.exitcode is None, output(folder)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, output(folder)
    return folder / "run"


def kept_checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


def without_sums(run: Path) -> None:
    """As a run of version 0.2, or of somebody who knows what is checked."""
    for path in run.rglob("*.sha256"):
        path.unlink()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("sha256", "config")}))


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def epochs(run: Path) -> int:
    return sum(1 for line in (run / "metrics.csv").read_text().splitlines()[1:] if line.split(",")[-1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted(tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copied"))  # another place than it was trained in


def resume(folder: Path, *words: str) -> int:
    return finish("resume", "copied", *words, folder=folder)


def test_values_are_changed_shown_and_logged(run: Path, tmp_path: Path) -> None:
    assert resume(tmp_path, "trainer.max_epochs=6", "rank.x=4", "optimizer.lr=0.2") == 0, output(tmp_path)
    shown = output(tmp_path)
    assert "trainer.max_epochs: 200 -> 6  (the schedule goes on as if it had been so from the start)" in shown
    assert "optimizer.lr: 0.1 -> 0.2  (from the checkpoint on)" in shown
    assert "compression.rank.x: 3.0 -> 4" in shown  # which repeats rank.x
    assert epochs(run) == 6
    config = OmegaConf.load(run / "config.yaml")
    assert config.trainer.max_epochs == 6
    assert config.compression.rank.x == config.rank.x == 4
    layers = json.loads((run / "report.json").read_text())["layers"]
    assert layers[0]["dense"]["params"] / layers[0]["compressed"]["params"] > 3.5
    assert facts(run)["resumed"][0]["overrides"] == "trainer.max_epochs=6 rank.x=4 optimizer.lr=0.2"
    assert len(facts(run)["resumed"][0]["changed"]) == 4


def test_settings_of_the_optimizer_take_effect_from_the_checkpoint_on(run: Path, tmp_path: Path) -> None:
    before = torch.load(kept_checkpoints(run)[-1], weights_only=True)["global_step"]
    words = ["optimizer.lr=0.02", "optimizer.momentum=0.5", "optimizer.nesterov=false", "trainer.max_epochs=40"]
    assert resume(tmp_path, *words, "checkpoint_every=1") == 0, output(tmp_path)
    newest = torch.load(kept_checkpoints(run)[-1], weights_only=True)
    (group,), (schedule,) = newest["optimizer_states"][0]["param_groups"], newest["lr_schedulers"]
    assert newest["global_step"] > before
    assert (group["momentum"], group["nesterov"]) == (0.5, False)
    assert schedule["base_lrs"] == [group["initial_lr"]] == pytest.approx([0.02])
    share = (1 + math.cos(math.pi * newest["global_step"] / (40 * 11))) / 2
    assert group["lr"] == pytest.approx(0.02 * share)
    changed = {"optimizer._target_": ("torch.optim.AdamW", "torch.optim.Adam")}
    with pytest.raises(ValueError, match="state of another optimizer"):
        show(changed, run, False, OmegaConf.load(run / "config.yaml"))


def test_a_smaller_rate_saves_a_run_that_has_diverged_after_a_checkpoint(tmp_path: Path) -> None:
    words = ["optimizer.lr=1e5", "trainer.max_epochs=6", "hydra.run.dir=copied"]
    assert finish(*TRAIN, *words, folder=tmp_path) == 3, output(tmp_path)
    assert kept_checkpoints(tmp_path / "copied")
    assert finish("report", "copied", folder=tmp_path) == 0
    assert "diverged: training diverged: the loss" in output(tmp_path).rpartition("copied")[0]
    assert resume(tmp_path, "label_smoothing=0.1") == 3, output(tmp_path)
    assert resume(tmp_path, "optimizer.lr=0.001") == 0, output(tmp_path)
    assert facts(tmp_path / "copied")["status"] == "finished"


def test_a_finished_run_has_nothing_to_do_unless_something_is_changed(run: Path, tmp_path: Path) -> None:
    assert resume(tmp_path, "trainer.max_epochs=5") == 0, output(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert resume(tmp_path) == 0
    assert "Nothing to do" in output(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert resume(tmp_path, "trainer.max_epochs=7") == 0
    assert epochs(run) == 7
    assert facts(run)["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compression=lc"], "is a group"),
        (["compression.SD=3"], "compression.S_D"),
        (["seed=1"], "--force"),
        (["data.batch_size=7"], "--force"),
        (["decomposition.x=7"], "has no `decomposition.x`"),
        (["compression._target_=lowrank_pl.LearningCompression"], "Expected no key `compression.S_D`"),
        (["compression.method._target_=lowrank_pl.BlockSVD"], "--force"),
        (["rank.x=2,3"], "one value for each key"),
        (["~rank.x"], "one value for each key"),
        (["+trainer.plugins={_target_: os.system}", "--force"], "'os.system' is not on"),
    ],
)
def test_other_changes_are_refused(words: list[str], message: str, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(tmp_path, *words) != 0
    assert message in output(tmp_path)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_force_changes_the_seed_of_everything(run: Path, tmp_path: Path) -> None:
    assert resume(tmp_path, "seed=5", "trainer.max_epochs=4", "--force") == 0, output(tmp_path)
    assert OmegaConf.load(run / "config.yaml").data.seed == 5


def test_the_checkpoint_before_a_truncated_one_is_taken(run: Path, tmp_path: Path) -> None:
    _, newest = kept_checkpoints(run)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    half = newest.with_name(f".{newest.name}.1234.new")  # of a kill while it was written
    half.write_bytes(b"")
    assert resume(tmp_path, "trainer.max_epochs=4") == 0, output(tmp_path)
    assert not half.exists()
    assert f"{newest} cannot be read" in output(tmp_path)
    assert "going on from the one before" in output(tmp_path)
    assert epochs(run) == 4


def test_a_full_disk_loses_nothing(run: Path, tmp_path: Path) -> None:
    kept = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    command = f"ulimit -f 64; {sys.executable} -m lowrank_pl.cli resume copied"  # blocks of 1024 bytes
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert kept == {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert facts(run)["status"] == "failed"
    assert resume(tmp_path, "trainer.max_epochs=4") == 0, output(tmp_path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.max_epochs=many", "Expected `trainer.max_epochs` to be a whole number or null but got 'many'"),
        ("trainer.max_epochs=1", "max_epochs=1"),  # fewer than have been trained; Lightning says so
    ],
)
def test_values_that_do_not_work_are_not_kept(word: str, message: str, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(tmp_path, word) != 0
    assert message in output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_network_is_named(run: Path, tmp_path: Path) -> None:
    without_sums(run)
    for path in kept_checkpoints(run):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"] = {"net.conv.weight": torch.zeros(3)}
        torch.save(checkpoint, path)
    assert resume(tmp_path) != 0
    assert ".ckpt is of another network than the config" in output(tmp_path)


def test_without_checkpoints_it_starts_over(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert resume(tmp_path, "trainer.max_epochs=2") == 0, output(tmp_path)
    assert epochs(run) == 2


def test_no_config_no_run_no_data(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    assert resume(tmp_path) != 0
    assert "no config.yaml" in output(tmp_path)
    assert finish("resume", "nothing", folder=tmp_path) != 0
    assert not (tmp_path / "nothing").exists()


def test_missing_data_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    labels = np.arange(300) % 10
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    run = interrupted(tmp_path, "data=arrays", "data.file=images.npz", "~data.size", "+data.size=8")
    assert OmegaConf.load(run / "config.yaml").data.file == str(tmp_path / "images.npz")
    (tmp_path / "images.npz").rename(tmp_path / "elsewhere.npz")
    kept = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert finish("resume", "run", "trainer.max_epochs=30", folder=tmp_path) != 0
    assert "images.npz" in output(tmp_path)
    assert kept == {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    (tmp_path / "elsewhere.npz").rename(tmp_path / "images.npz")
    assert finish("resume", "run", folder=tmp_path) == 0, output(tmp_path)


def test_two_at_once(run: Path, tmp_path: Path) -> None:
    first = start("resume", "copied", folder=tmp_path)
    while facts(run)["status"] != "running":
        time.sleep(0.01)
    assert resume(tmp_path) != 0
    assert "another process works on" in output(tmp_path)
    first.kill()
    first.join()
    assert resume(tmp_path, "trainer.max_epochs=4") == 0, output(tmp_path)  # the killed one has left no lock


def test_a_run_is_not_written_over(run: Path, tmp_path: Path) -> None:
    config = (run / "config.yaml").read_bytes()
    assert finish(*TRAIN, "hydra.run.dir=copied", folder=tmp_path) != 0
    assert "holds a run already" in output(tmp_path)
    assert (run / "config.yaml").read_bytes() == config


def test_its_config_starts_afresh_elsewhere(run: Path, tmp_path: Path) -> None:
    words = ["--config-dir", "copied", "--config-name", "config", "trainer.max_epochs=2", "rank.x=5"]
    assert finish("train", *words, "hydra.run.dir=fresh", folder=tmp_path) == 0, output(tmp_path)
    config = OmegaConf.load(tmp_path / "fresh" / "config.yaml")
    assert config.compression.rank.x == config.rank.x == 5
    assert epochs(tmp_path / "fresh") == 2
    assert facts(run)["status"] == "interrupted"


HIDDEN = "pytorch_lightning.callbacks.model_checkpoint.os.system"


class Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def evil_checkpoint(run: Path) -> None:
    without_sums(run)
    for path in kept_checkpoints(run):
        torch.save({"state_dict": Payload()}, path)


def evil_pickle(run: Path) -> None:
    without_sums(run)
    for path in kept_checkpoints(run):
        path.write_bytes(pickle.dumps(Payload()))


def config_with(**values: str):
    def write(run: Path) -> None:
        config = OmegaConf.load(run / "config.yaml")
        for key, value in values.items():
            OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
        OmegaConf.save(config, run / "config.yaml")
        without_sums(run)

    return write


def text(name: str, content: str):
    def write(run: Path) -> None:
        without_sums(run)
        (run / name).write_text(content)

    return write


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (config_with(model__net={"_target_": "os.system", "command": "touch executed"}), "'os.system' is not on"),
        (config_with(model__net={"_target_": "torch.hub.load", "repo_or_dir": "a/b"}), "torch.hub.load"),
        (config_with(model__net={"_target_": "torch.load", "f": "x"}), "torch.serialization.load"),
        (config_with(model__net={"_target_": HIDDEN}), f"{HIDDEN}', which is posix.system"),
        (config_with(model__net={"_target_": "lowrank_pl.run_files.time.sleep"}), "not on the list"),
        (config_with(model__net={"_target_": "lowrank_pl.files.write_files"}), "not on the list"),
        (config_with(model__net={"_target_": "lowrank_pl.ExtractStructure", "dirpath": "/x"}), "not on the list"),
        (config_with(model__net={"_target_": "lowrank_pl.runs.Run.start"}), "not on the list"),
        (config_with(trainer__callbacks=[{"_target_": "os.system"}]), "'os.system' is not on"),
        (config_with(model__net={"_target_": "antigravity"}), "'antigravity' is not on"),
        (config_with(model__weights="${oc.env:HOME}"), "plain value"),
        (config_with(hydra={"callbacks": {"x": {"_target_": "os.system"}}}), "no settings of Hydra"),
        (config_with(defaults=["evil"]), "no settings of Hydra"),
        (text("config.yaml", "- a\n"), "expected a mapping"),
        (text("config.yaml", "!!python/object/apply:os.system ['touch executed']\n"), "but got the tag"),
        (text("run.json", "{"), "is not JSON"),
        (text("run.json", '{"status": 3}'), "expected an object"),
    ],
)  # fmt: skip
def test_a_malicious_run_executes_nothing(attack, message: str, run: Path, tmp_path: Path) -> None:
    attack(run)
    assert resume(tmp_path) != 0
    assert message in output(tmp_path)
    if "run.json" not in message and (run / "config.yaml").is_file():
        assert finish("train", "--config-dir", "copied", "--config-name", "config", folder=tmp_path) != 0 or (
            message in ("is not JSON", "expected an object")
        )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("attack", [evil_checkpoint, evil_pickle])
def test_a_malicious_checkpoint_is_not_read(attack, run: Path, tmp_path: Path) -> None:
    attack(run)
    assert resume(tmp_path) != 0
    assert "no checkpoint in" in output(tmp_path)
    assert "remove them to start from the beginning" in output(tmp_path)
    assert not list(tmp_path.rglob("executed"))


def test_the_list_is_extended_on_the_command_line(run: Path, tmp_path: Path) -> None:
    config_with(model__net={"_target_": "torch.nn.Flatten"})(run)
    assert resume(tmp_path) != 0
    assert "--allow torch.nn.Flatten" in output(tmp_path)
    assert resume(tmp_path, "--allow", "torch.nn.Flatten") != 0  # which takes no input_shape
    assert "input_shape" in output(tmp_path)
