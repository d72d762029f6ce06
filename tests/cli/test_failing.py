"""A run that fails after it has begun: one line, and where the run is."""

import json
from pathlib import Path

from killing import attack

SMALL = [
    "train", "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "trainer.max_epochs=2",
]  # fmt: skip
FAILS = "+trainer.val_check_interval=1000"  # of 11 batches, which Lightning counts when it trains


def test_it_is_said_in_one_line_after_the_directory(tmp_path: Path) -> None:
    done = attack(*SMALL, FAILS, "hydra.run.dir=run", folder=tmp_path, seconds=60, memory=2**32)
    assert done.is_clean
    assert done.code == 1
    *before, where, said = done.output.splitlines()
    assert where == f"What there is of the run is in {tmp_path / 'run'}"
    assert said.startswith("lowrank-pl train: `val_check_interval` (1000) must be less than")
    assert all(" s  training: " in line for line in before)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed"
    assert said.endswith(facts["error"])


def test_an_error_of_a_program_has_its_trace(tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    net = "net: {_target_: nets.Broken}\nweights: null\n"
    (tmp_path / "conf" / "model" / "broken.yaml").write_text(net)
    words = ["--config-dir", "conf", "--trust", "model=broken", "hydra.run.dir=run"]
    done = attack(*SMALL, *words, folder=tmp_path, seconds=60, memory=2**32)
    assert done.code == 1
    assert "ZeroDivisionError: on purpose" in done.output
    assert 'nets.py", line' in done.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == "on purpose"


def test_other_jobs_of_multirun_go_on(tmp_path: Path) -> None:
    words = ["-m", "optimizer.lr=1e6,0.1", "hydra.sweep.dir=many"]
    done = attack(*SMALL, *words, folder=tmp_path, seconds=120, memory=2**32)
    assert done.is_clean
    assert done.code == 3
    assert "training diverged: " in done.output
    assert "Error executing job" not in done.output
    states = [json.loads((tmp_path / "many" / name / "run.json").read_text())["status"] for name in "01"]
    assert states == ["diverged", "finished"]
