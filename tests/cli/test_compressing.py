"""Compression without training from the command line: reconstruction, fine-tuning, resume, sweep, report."""

import copy
import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import finish, start
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_kills import assert_same, without_latency

from lowrank_pl import RankFraction, Samples, Targets, compress, load_compressed
from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.build import build
from lowrank_pl.cli.mistakes import check_words
from lowrank_pl.cli.schema import check_config
from lowrank_pl.data import Digits
from lowrank_pl.models import CifarResNet, LeNet300
from lowrank_pl.overview import gather
from lowrank_pl.runs import OneShot

QUIET = ["trainer.enable_progress_bar=false", "decomposition=svd"]
SMALL = ["model=lenet300", "data.size=8", "targets=all", "reference.epochs=3", *QUIET]
ONE_SHOT = ["compression=reconstruct", "reconstruct.samples=200", *SMALL]


def train(*words: str, folder: Path) -> Path:
    code = finish("train", *words, "hydra.run.dir=run", folder=folder)
    assert code == 0, (folder / "output.txt").read_text()
    return folder / "run"


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network whose convolutions have no biases, with batch norms re-estimated, and its factors trained."""
    words = ["model=resnet20", "data.size=8", "reference.epochs=2", "reconstruct.samples=60", "rank.x=2", *QUIET]
    return train(
        *words, "compression=reconstruct", "reconstruct.recalibrate_bn=true", "finetune=default", "finetune.epochs=1",
        folder=tmp_path_factory.mktemp("resnet"),
    )  # fmt: skip


def test_it_is_what_compress_makes_on_the_first_training_images(tmp_path: Path) -> None:
    run = train(*ONE_SHOT, "rank=rank_fraction", "reconstruct=outputs", folder=tmp_path)
    reference = LeNet300(input_shape=(1, 8, 8))
    reference.load_state_dict(load_file(run / "reference.safetensors"))
    data = Digits(size=8, val_fraction=0.1)
    data.setup()
    images, labels = next(iter(data.train_eval_dataloader()))  # 234 are taken: 200, and every sixth batch held back
    batches = list(zip(images.split(20), labels.split(20), strict=True))
    targets = Targets(skip_first=False, skip_last=False)
    expected = compress(reference, "svd", RankFraction(0.5), targets, data=Samples(batches, 200), reconstruct="outputs")
    found = load_compressed(LeNet300(input_shape=(1, 8, 8)), run / "compressed").state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    errors = [layer["response"] for layer in report_of(run)["layers"]]
    known = expected.lowrank_pl_record["responses"]
    assert errors == pytest.approx([each["held_out"] for each in known.values()], rel=1e-3)
    assert {each["samples"] for each in known.values()} == {200}
    assert not (run / "metrics.csv").exists()  # nothing is trained but the reference
    assert (run / "reference/metrics.csv").is_file()


def test_response_errors_are_in_every_report(tmp_path: Path) -> None:
    run = train(*ONE_SHOT, folder=tmp_path)
    layers = report_of(run)["layers"]
    errors = [layer["response"] for layer in layers if layer["structure"] != "dense"]
    assert len(errors) == 3
    assert all(0 < error < 1 for error in errors)
    assert "| response error |" in (run / "report.md").read_text()
    assert f"| {100 * errors[0]:.2g} % |" in (run / "report.md").read_text()
    (entry,) = gather([run])
    assert entry.method == "reconstruct asymmetric svd compression_ratio 3"
    assert entry.value("compressed", "response") == pytest.approx(100 * sum(errors) / 3)
    assert finish("report", "run", folder=tmp_path) == 0
    (line,) = csv.DictReader((run / "runs.csv").open())
    assert float(line["response_error"]) == pytest.approx(100 * sum(errors) / 3)
    assert "<th>response %</th></tr></thead>" in (run / "runs.html").read_text()
    said = (tmp_path / "output.txt").read_text()
    assert "compressing, on the first 200 training images" in said
    assert "resp." in said


def test_fine_tuning_trains_factors_biases_and_norms(resnet: Path) -> None:
    nets = [load_compressed(CifarResNet(20, input_shape=(1, 8, 8)), resnet / n) for n in ("extracted", "compressed")]
    assert all(p.requires_grad for p in nets[0].parameters())
    before, after = (net.state_dict() for net in nets)
    assert before.keys() == after.keys()
    biases = [name for name in before if name.endswith("1.bias") and "conv" in name]
    assert len(biases) == 18  # that reconstruction has added
    norms = [name for name in before if name.endswith("running_var")]
    assert len(norms) == 19
    trained = [name for name, _ in nets[0].named_parameters() if name not in biases]  # no loss sees one before a norm
    assert not any(torch.equal(before[name], after[name]) for name in (*trained, *norms))
    structure = json.loads((resnet / "extracted/structure.json").read_text())
    assert len(structure["responses"]) == 18
    assert {layer["response"] for layer in report_of(resnet)["layers"]} == {None}  # those of other factors
    assert json.loads((resnet / "extracted/test.json").read_text())["accuracy"] > 0.1
    dense = load_file(resnet / "dense.safetensors")
    norm = "bn1.running_var" if "bn1.running_var" in dense else norms[0]
    assert not torch.equal(dense[norm], before[norm])  # re-estimated


def test_factors_are_trained_directly_from_reconstructed_ones(tmp_path: Path) -> None:
    words = [word for word in ONE_SHOT if word != "compression=reconstruct"]
    run = train(
        *words, "compression=direct", "reconstruct=outputs", "metric=inputs", "trainer.max_epochs=1", folder=tmp_path
    )
    assert (run / "metrics.csv").is_file()
    assert {layer["response"] for layer in report_of(run)["layers"]} == {None}
    (entry,) = gather([run])
    assert entry.method == "direct outputs svd compression_ratio 3 metric=inputs"


def test_stopped_at_any_moment_it_ends_alike(tmp_path: Path) -> None:
    words = [*ONE_SHOT, "finetune=default", "finetune.epochs=2", "reconstruct.samples=1000", "reconstruct.places=null"]
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    whole = train(*words, folder=tmp_path / "whole")
    seconds = time.monotonic() - begin
    for number, part in (("kill", 0.1), ("kill", 0.5), ("terminate", 0.3)):
        folder = tmp_path / f"{number}{part}"
        folder.mkdir()
        process = start("train", *words, "hydra.run.dir=run", folder=folder)
        while process.is_alive() and not (folder / "run" / "config.yaml").is_file():
            process.join(0.1)
        process.join(part * seconds)
        getattr(process, number)()  # nothing happens where it was faster this time
        process.join()
        assert finish("resume", "run", folder=folder) == 0, (folder / "output.txt").read_text()
        assert_same(whole, folder / "run")


def test_a_stage_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    run = train(*ONE_SHOT, folder=tmp_path)
    before = without_latency(run / "report.json")
    (run / "compressed/model.safetensors").write_bytes(b"")
    assert finish("resume", "run", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert without_latency(run / "report.json") == before
    assert finish("resume", "run", "reconstruct.samples=100", folder=tmp_path) == 0
    assert without_latency(run / "report.json") != before
    config = OmegaConf.load(run / "config.yaml")
    assert config.reconstruct.samples == config.compression.samples == 100
    assert finish("resume", "run", "reconstruct.mode=outputs", folder=tmp_path) != 0
    assert "reconstruct.mode, compression.reconstruct: the model, data, method" in (tmp_path / "output.txt").read_text()


def test_a_sweep_over_modes_and_ranks(tmp_path: Path) -> None:
    words = [*ONE_SHOT, "reconstruct=none,outputs", "rank=greedy_energy", "rank.ratio=0.3,0.6"]
    assert finish("sweep", *words, "--dir", "sweep", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    entries = gather([tmp_path / "sweep"])
    assert sorted(entry.method for entry in entries) == [
        f"{kind} svd greedy_energy {ratio}" for kind in ("one-shot", "reconstruct outputs") for ratio in ("0.3", "0.6")
    ]
    assert all((entry.value("compressed", "response") or 0) > 0 for entry in entries)
    assert "[2] reconstruct=outputs ratio=0.3" in (tmp_path / "output.txt").read_text()


def test_stored_configs_of_earlier_versions_go_on() -> None:
    """Theirs is `compress` with its arguments, and there are neither `metric` nor `reconstruct`."""
    made: list[Any] = []
    words = ["compression=direct", *SMALL]
    check_words(words, "train", check=lambda config, keys: made.append(config))
    config = made[0]
    del config["metric"], config["reconstruct"]
    later = ("metric", "reconstruct", "samples", "places", "recalibrate_bn", "train", "initialize", "norm_between")
    for key in later:
        del config.compression[key]
    config.compression = {**config.compression, "_target_": "lowrank_pl.compress", "_partial_": True}
    check_targets(config)
    check_config(config)
    compression = build(config, None).compression
    assert isinstance(compression, OneShot)
    assert compression.train
    assert not compression.needs_images


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("reconstruct=both", "Expected `reconstruct` to be one of asymmetric, none, nonlinear, outputs but got 'both'"),
        ("metric=outputs", "Expected `metric` to be one of inputs, inputs_and_gradients, weights but got 'outputs'"),
        ("reconstruct.mode=both", "Expected `reconstruct.mode` to be 'outputs', 'asymmetric'"),
        ("reconstruct.samples=0", "Expected `reconstruct.samples` to be at least 1 (images) but got 0"),
        ("reconstruct.samples=1.5", "Expected `reconstruct.samples` to be a whole number"),
        ("reconstruct.places=-1", "Expected `reconstruct.places` to be at least 1 or null"),
        ("reconstruct.recalibrate_bn=1", "Expected `reconstruct.recalibrate_bn` to be true or false"),
        ("+reconstruct.sample=3", "Expected no key `reconstruct.sample`; close: reconstruct.samples"),
        ("compression.metric=foo", "Expected `compression.metric` to be"),
        ("compression.train=yes", "Expected `compression.train` to be true or false"),
        ("compression.samples=-2", "`compression`: Expected argument `samples`"),
        ("compression=deeptwist reconstruct=outputs", "Expected no `reconstruct.mode` 'outputs'"),
        ("compression=lc reconstruct.recalibrate_bn=true", "Expected no `reconstruct.recalibrate_bn` true"),
        ("targets.include=[foo]", "Pattern 'foo'"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(words: str, message: str) -> None:
    def whole(config: Any, keys: set[str]) -> None:
        build(config, None)

    with pytest.raises(ValueError, match=r"Expected|Pattern") as error:
        check_words(["compression=reconstruct", *SMALL, *words.split()], "train", check=whole)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_defaults_are_as_they_were() -> None:
    made: list[Any] = []
    for words in ("seed=0", "compression=lc", "compression=direct", "compression=reconstruct"):
        check_words(words.split(), "train", check=lambda config, keys: made.append(config))
    assert [config.compression.metric for config in made] == ["weights", "weights", "weights", "inputs"]
    assert [config.reconstruct.mode for config in made] == [None, None, None, "asymmetric"]


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return list(zip(images.split(7), torch.zeros(count, dtype=torch.int64).split(7), strict=True))


def test_too_few_images_are_said_once_with_the_key() -> None:
    net = LeNet300(input_shape=(1, 8, 8)).eval()
    state = copy.deepcopy(net.state_dict())
    one_shot = OneShot("svd", RankFraction(0.5), Targets(skip_first=False), "inputs", "asymmetric", samples=20)
    with pytest.warns(UserWarning, match=r"^`reconstruct.samples`, `reconstruct.places`: \d of") as caught:
        one_shot(net, batches(7)[0][0], lambda: batches(20), lambda: None)
    assert len([warning for warning in caught if "Give more data" in str(warning.message)]) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_images_that_are_not_finite_are_said_with_the_layer() -> None:
    net = LeNet300(input_shape=(1, 8, 8)).eval()
    bad = [(images * float("nan"), labels) for images, labels in batches(40)]
    one_shot = OneShot("svd", RankFraction(0.5), Targets(skip_first=False), "inputs", "outputs", samples=20)
    with pytest.raises(ValueError, match=r"^`compression`: Layer 'fc1', batch 0 of the data: NaN or Inf"):
        one_shot(net, batches(7)[0][0], lambda: bad, lambda: None)


def test_a_copied_run_has_all_it_needs(resnet: Path, tmp_path: Path) -> None:
    shutil.copytree(resnet, tmp_path / "run")
    assert finish("resume", "run", folder=tmp_path) == 0
    assert "Nothing to do" in (tmp_path / "output.txt").read_text()
