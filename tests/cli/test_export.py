"""`lowrank-pl export` and `evaluate` on a run."""

import json
import os
import pickle
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from killing import attack, finish
from safetensors.torch import load_file, save_file

from lowrank_pl.storage import checksum

TRAIN = [
    "train", "model=lenet300", "data.size=8", "targets=all", "decomposition=svd", "trainer.enable_progress_bar=false",
    "trainer.max_epochs=3", "compression.S_D=7", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert finish(*TRAIN, folder=folder) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def test_every_form_agrees(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    kinds = ["pt2", "onnx", *(["openvino"] if find_spec("openvino") else []), "safetensors"]
    for kind in kinds:
        assert finish("export", "run", "--to", kind, folder=tmp_path) == 0, output(tmp_path)
    assert finish("evaluate", "run", folder=tmp_path) == 0, output(tmp_path)
    results = json.loads((run / "evaluation.json").read_text())
    assert list(results) == ["dense", "compressed", "deployed", *kinds]
    report = json.loads((run / "report.json").read_text())
    for name, values in results.items():
        expected = report["dense" if name == "dense" else "compressed"]["accuracy"]
        assert abs(values["accuracy"] - expected) < 1e-6
        assert set(values["latency_ms"]) == {"1", "32"}
        assert values.get("difference", 0) < 1e-5
    assert "onnx" in output(tmp_path)


def test_another_file_by_name(run: Path, tmp_path: Path) -> None:
    assert finish("export", "run", "--to", "pt2", "--output", "out/small.pt2", folder=tmp_path) == 0
    assert (tmp_path / "out" / "small.pt2").stat().st_size > 0
    assert finish("export", "run", "--to", "pt2", "--output", "out", folder=tmp_path) == 0
    assert (tmp_path / "out" / "model.pt2").stat().st_size > 0


def test_an_export_of_another_network_is_noticed(run: Path, tmp_path: Path) -> None:
    assert finish("export", "run", "--to", "pt2", folder=tmp_path) == 0
    assert finish(*TRAIN, "seed=1", "hydra.run.dir=other", folder=tmp_path) == 0
    shutil.copytree(run / "exported", tmp_path / "other" / "exported")
    assert finish("evaluate", "other", folder=tmp_path) == 1
    assert "pt2 does not agree" in output(tmp_path)


class Payload:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_a_foreign_pt2_is_not_opened(run: Path, tmp_path: Path) -> None:
    (run / "exported").mkdir()
    with zipfile.ZipFile(run / "exported" / "model.pt2", "w") as archive:
        archive.writestr("data/weights/x", pickle.dumps(Payload()))
    assert finish("evaluate", "run", folder=tmp_path) != 0
    assert "--trust" in output(tmp_path)
    assert not (tmp_path / "executed").exists()


def replaced(run: Path, config: str) -> None:
    """Another config, in a run that says nothing of the one it had."""
    (run / "config.yaml").write_text(config)
    facts = {"status": "finished", "links": {}, "done": ["fit"]}
    (run / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
        (lambda run: (run / "dense.safetensors").unlink(), "dense.safetensors"),
        (lambda run: (run / "compressed" / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors"),
        (lambda run: (run / "run.json").write_text('{"status": "interrupted", "links": {}, "done": []}'), "resume"),
        (
            lambda run: (run / "config.yaml").write_text("model: {net: {_target_: os.system}}"),
            "config.yaml is damaged or was edited",
        ),
        (
            lambda run: replaced(run, "model: {net: {_target_: os.system}}"),
            "os.system' is not on the list",
        ),
    ],
)
def test_what_is_no_finished_run_is_refused(damage, message: str, run: Path, tmp_path: Path) -> None:
    damage(run)
    for command in (["export", "run", "--to", "pt2"], ["evaluate", "run"]):
        assert finish(*command, folder=tmp_path) != 0
        assert message in output(tmp_path)
    assert not (run / "exported").exists()


def test_nan_in_any_form_is_said(run: Path, tmp_path: Path) -> None:
    assert finish("export", "run", "--to", "safetensors", folder=tmp_path) == 0, output(tmp_path)
    file = run / "exported" / "model" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    structure = json.loads((file.parent / "structure.json").read_text())
    structure["sha256"] = checksum(file.read_bytes(), structure)
    (file.parent / "structure.json").write_text(json.dumps(structure))
    done = attack("evaluate", "run", folder=tmp_path, seconds=120)
    assert done.is_clean
    assert done.code == 1
    assert "safetensors gives NaN or infinity for" in done.output
    results = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert results["safetensors"]["difference"] is None
    assert results["compressed"]["not_finite"] == 0
    for name in ("model.safetensors", "structure.json"):
        shutil.copy(file.parent / name, run / "compressed" / name)
    for kind in ("safetensors", "pt2"):
        done = attack("export", "run", "--to", kind, "--output", "new.pt2", folder=tmp_path, seconds=120)
        assert done.is_clean
        assert done.code == 1
        assert "the network gives NaN or infinity on these images" in done.output
        assert not (tmp_path / "new.pt2").exists()


def test_a_foreign_onnx_file(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    (run / "exported").mkdir()
    file = run / "exported" / "model.onnx"
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    given = helper.make_tensor_value_info("x", kind, ["n", 1, 8, 8])
    for node, message in (
        (helper.make_node("Log", ["x"], ["y"]), "onnx: expected outputs of shape"),
        (helper.make_node("Nothing", ["x"], ["y"]), "model.onnx cannot be read"),
    ):
        graph = helper.make_graph([node], "g", [given], [helper.make_tensor_value_info("y", kind, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        file.write_bytes(model.SerializeToString())
        done = attack("evaluate", "run", folder=tmp_path, seconds=60)
        assert done.is_clean
        assert done.code == 1
        assert message in done.output
    with open(file, "wb") as large:
        large.truncate(10**10)
    done = attack("evaluate", "run", folder=tmp_path, seconds=60)
    assert done.code == 1
    assert "model.onnx: expected at most" in done.output


def test_nothing_is_written_where_links_lead(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "exported").symlink_to(tmp_path / "elsewhere")
    for kind in ("pt2", "safetensors"):
        assert finish("export", "run", "--to", kind, folder=tmp_path) == 1
        assert "exported is a link" in output(tmp_path)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_openvino_network_of_somebody_else_is_not_opened(run: Path, tmp_path: Path) -> None:
    (run / "exported").mkdir()
    for suffix in (".xml", ".bin"):
        (run / "exported" / f"model{suffix}").write_bytes(b"<net/>")
    assert finish("evaluate", "run", folder=tmp_path) == 1
    assert "nothing bounds what an OpenVINO network takes: export it again, or add --trust" in output(tmp_path)
