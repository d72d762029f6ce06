"""From every checkpoint that a run keeps, under many settings, resuming ends as the uninterrupted run did."""

import json
import shutil
from pathlib import Path

import pytest
from killing import finish

from lowrank_pl.run_files import facts_text

COMMON = [
    "train", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false", "seed=3",
    "data.augment=true", "checkpoint_every=4", "hydra.run.dir=run",
]  # fmt: skip
LENET, RESNET = ["model=lenet300", "compression.S_D=3"], ["model=resnet20", "model.net.depth=8", "data.size=16"]
LC = ["compression.steps=5", "compression.growth=2", "compression.mu0=0.1", "reference.epochs=2"]
SETTINGS = {
    "accumulation": [*LENET, "trainer.max_epochs=4", "trainer.accumulate_grad_batches=3"],
    "validation within epochs": [*LENET, "trainer.max_epochs=3", "+trainer.val_check_interval=0.5"],
}
SLOW = {
    "one step per epoch": [*LENET, "trainer.max_epochs=6", "data.batch_size=2000"],
    "factorized first": ["model=lenet300", "compression=direct", "trainer.max_epochs=3", "reference.epochs=2"],
    "bfloat16": [*LENET, "trainer.max_epochs=4", "trainer.precision=bf16-mixed"],
    "batch norm": [*RESNET, "compression.S_D=5", "compression.recalibrate_bn=3", "trainer.max_epochs=3"],
    "lc with batch norm": [*RESNET, "compression=lc", *LC],
    "lc to a budget": ["model=lenet300", "compression=lc_budget", *LC],
    "admm": [
        "model=lenet300", "compression=admm", "compression.lambda_1=0.1", "compression.lambda_2=0.1", *LC[:1], *LC[3:],
        "metric=inputs", "finetune=three_phases",
    ],
    "low rank and sparse": [*LENET, "trainer.max_epochs=3", "decomposition=low_rank_plus_sparse", "metric=inputs"],
    "max_steps": [*LENET, "trainer.max_epochs=-1", "trainer.max_steps=30", "scheduler=constant"],
    "parts of epochs": [*LENET, "trainer.max_epochs=6", "+trainer.limit_train_batches=5"],
    "rare validation": [*LENET, "trainer.max_epochs=6", "+trainer.check_val_every_n_epoch=2"],
    "no compression": ["model=lenet300", "compression=none", "trainer.max_epochs=3"],
}  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, id=name) for name, words in SETTINGS.items()]
    + [pytest.param(words, id=name, marks=pytest.mark.slow) for name, words in SLOW.items()],
)
def test_from_every_checkpoint(words: list[str], tmp_path: Path) -> None:
    assert finish(*COMMON, *words, folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert len(kept) == 2
    for checkpoint in kept:
        copied = Path(shutil.copytree(tmp_path / "run", tmp_path / checkpoint.stem))
        for other in kept:
            if other != checkpoint:
                (copied / "checkpoints" / other.name).unlink()
        facts = json.loads((copied / "run.json").read_text())
        del facts["sha256"]
        (copied / "run.json").write_bytes(facts_text({**facts, "status": "running", "done": []}))  # as a kill leaves it
        assert finish("resume", str(copied), folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
        for name in ("dense.safetensors", "compressed/model.safetensors", "metrics.csv"):
            assert (copied / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), (checkpoint.name, name)
