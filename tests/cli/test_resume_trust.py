"""What `resume` believes: data that were replaced, places in configs from elsewhere, trainings that diverged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from killing import finish
from omegaconf import OmegaConf

TRAIN = [
    "train", "model=lenet300", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "trainer.max_epochs=2", "hydra.run.dir=run",
]  # fmt: skip


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def from_elsewhere(run: Path) -> None:
    """Without what only the user who started it can have."""
    known = facts(run)
    (run / "run.json").write_text(json.dumps({k: v for k, v in known.items() if k not in ("sha256", "config")}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert finish(*TRAIN, "data.size=8", f"paths.references={folder}/shared", folder=folder) == 0, output(folder)
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_replaced_data_need_force(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    labels = np.arange(300) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "images.npz", **arrays)
    assert finish(*TRAIN, "data=arrays", "data.file=images.npz", folder=tmp_path) == 0, output(tmp_path)
    images[7, 3, 3] ^= 1
    np.savez(tmp_path / "images.npz", **arrays)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert finish("resume", "run", "trainer.max_epochs=3", folder=tmp_path) == 1
    assert "the data are not those" in output(tmp_path)
    assert "--force" in output(tmp_path)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert finish("resume", "run", "trainer.max_epochs=3", "--force", folder=tmp_path) == 0, output(tmp_path)
    assert finish("resume", "run", "trainer.max_epochs=4", folder=tmp_path) == 0, output(tmp_path)


def test_own_places_are_believed_and_those_of_others_are_not(run: Path, finished: Path, tmp_path: Path) -> None:
    assert finish("resume", "run", "trainer.max_epochs=3", folder=tmp_path) == 0, output(tmp_path)
    from_elsewhere(run)
    assert finish("resume", "run", "trainer.max_epochs=4", folder=tmp_path) == 1
    shared = finished.parent / "shared"
    assert f"`paths.references` is '{shared}' in a config from elsewhere" in output(tmp_path)
    word = f"paths.references={shared}"
    assert finish("resume", "run", "trainer.max_epochs=4", word, folder=tmp_path) == 0, output(tmp_path)
    assert finish("resume", "run", "trainer.max_epochs=5", folder=tmp_path) == 0, output(tmp_path)  # signed now


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cost": {"_target_": "lowrank_pl.Latency", "cache": "OUT/cache.json"}}, "`cost.cache`"),
        ({"paths": {"references": "OUT/refs"}}, "`paths.references`"),
        ({"paths": {"references": "RUN/../refs"}}, "`paths.references`"),
        ({"logger": {"_target_": "pytorch_lightning.loggers.TensorBoardLogger", "name": "OUT/x"}}, "`logger.name`"),
        ({"logger": {"_target_": "pytorch_lightning.loggers.TensorBoardLogger", "version": "../../x"}},
         "`logger.version`"),
        ({"logger": {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "tracking_uri": "sqlite:///OUT/x.db"}},
         "`logger.tracking_uri`"),
        ({"data": {"_target_": "lowrank_pl.data.MNIST", "root": "OUT/data"}}, "`data.root`"),
    ],
)  # fmt: skip
def test_nothing_is_made_where_a_config_from_elsewhere_says(
    values: dict, message: str, run: Path, tmp_path: Path
) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.paths.references = None
    text = json.dumps(values).replace("OUT", str(tmp_path / "out")).replace("RUN", str(run))
    made = OmegaConf.merge(config, json.loads(text))
    for part in ("logger", "data"):
        if part in values:
            made[part] = json.loads(text)[part]
    OmegaConf.save(made, run / "config.yaml")
    from_elsewhere(run)
    assert finish("resume", "run", "trainer.max_epochs=3", folder=tmp_path) == 1
    assert message in output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "refs").exists()


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (["product_decay=1e38"], "training"),
        (["compression=lc", "compression.steps=2", "+reference.product_decay=1e38", "reference.epochs=1"], "reference"),
        (["finetune=default", "finetune.epochs=1", "finetune.product_decay=1e38"], "fine-tuning"),
    ],
)
def test_a_training_that_diverges_says_so(words: list[str], stage: str, tmp_path: Path) -> None:
    assert finish(*TRAIN, "data.size=8", *words, folder=tmp_path) == 3, output(tmp_path)
    assert f"{stage} diverged: " in output(tmp_path).splitlines()[-1]
    assert "Traceback" not in output(tmp_path)
    run = tmp_path / "run"
    assert facts(run)["status"] == "diverged"
    assert "not finite from step" in facts(run)["error"]
    assert not [path for path in run.rglob("*.ckpt") if "reference" in path.parts or stage != "fine-tuning"]
    assert finish("resume", "run", folder=tmp_path) == 1
    assert "has diverged" in output(tmp_path)
    assert finish("resume", "run", "--force", folder=tmp_path) == 3
    (key,) = (word.partition("=")[0].lstrip("+") for word in words if "1e38" in word)
    assert finish("resume", "run", f"{key}=0", folder=tmp_path) == 0, output(tmp_path)
    assert facts(run)["status"] == "finished"
    assert "error" not in facts(run)


def test_a_finished_run_whose_extension_diverges_can_be_made_anew(run: Path, finished: Path, tmp_path: Path) -> None:
    words = ["trainer.max_epochs=3", "label_smoothing=0.1", "product_decay=1e38"]
    assert finish("resume", "run", *words, folder=tmp_path) == 3, output(tmp_path)
    assert (run / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()
    assert finish("resume", "run", folder=tmp_path) == 0, output(tmp_path)
    for name in ("metrics.csv", "dense.safetensors", "compressed/model.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
