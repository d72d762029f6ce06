"""`${...}` in a path on the command line: a run takes it, or there is one line."""

from pathlib import Path

import pytest
from killing import attack
from omegaconf import OmegaConf

SMALL = ["model=lenet300", "data.size=8", "targets=all", "trainer.max_steps=1", "trainer.enable_progress_bar=false"]
LC = ["compression=lc", "compression.steps=2", "reference.epochs=1"]


@pytest.mark.parametrize(
    ("word", "key", "place"),
    [
        ("hydra.run.dir=${paths.data}/run", "", "data/run"),
        ("hydra.run.dir=runs/${seed}-${hydra:runtime.choices.model}", "", "runs/0-lenet300"),
        ("paths.references=${paths.data}/refs", "paths.references", "data/refs"),
        ("paths.references=${hydra:runtime.output_dir}/refs", "paths.references", "run/refs"),
    ],
)
def test_what_works(word: str, key: str, place: str, tmp_path: Path) -> None:
    train = [*SMALL, *LC, "paths.data=data", *(["hydra.run.dir=run"] if key else []), word]
    done = attack("train", *train, folder=tmp_path, seconds=60, memory=2**32)
    assert done.code == 0, done.output
    assert (tmp_path / place).is_dir()
    if key:
        assert OmegaConf.select(OmegaConf.load(tmp_path / "run" / "config.yaml"), key) == str(tmp_path / place)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hydra.run.dir=runs/${foo}", "`hydra.run.dir`: Interpolation key 'foo' not found"),
        ("hydra.run.dir=${", "expected key=value; quote"),
        ("paths.references=~/refs", "expected key=value; quote"),
        ('hydra.run.dir="~/run"', "Expected `hydra.run.dir` to be a folder's whole name"),
        ("paths.references=${oc.env:NOT_THERE}/refs", "Environment variable 'NOT_THERE' not found"),
        ("model.weights=${paths.data}/a.safetensors", "set `model.weights`"),
        ("seed=${paths.data}", "Expected `seed` to be a whole number"),
    ],
)
def test_what_does_not(word: str, says: str, tmp_path: Path) -> None:
    done = attack("train", *SMALL, word, folder=tmp_path, seconds=60, memory=2**32)
    assert done.is_clean
    assert done.code == 1
    assert says in done.output
    assert len(done.output.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["output.txt"]
