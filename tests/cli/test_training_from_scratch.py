"""Low-rank networks trained from scratch, from the command line."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import finish, start
from safetensors.torch import load_file
from test_kills import assert_same
from torch import nn

from lowrank_pl import load_compressed
from lowrank_pl.cli.build import build
from lowrank_pl.cli.mistakes import check_words
from lowrank_pl.layers import FactorChain
from lowrank_pl.models import CifarResNet
from lowrank_pl.overview import gather
from lowrank_pl.runs import OneShot

SMALL = ["model=resnet20", "data.size=8", "trainer.enable_progress_bar=false"]
SCRATCH = ["compression=direct", "reference=none", "decomposition=spatial_svd", *SMALL]
LENET = [*SCRATCH, "model=lenet5", "data.size=28"]


def net() -> nn.Module:
    return CifarResNet(depth=20, input_shape=(1, 8, 8))


def compression(*words: str) -> Any:
    made: list[Any] = []
    check_words(list(words), "train", check=lambda config, keys: made.append(build(config, None).compression))
    return made[0]


def test_it_learns_and_is_plain_in_the_end(tmp_path: Path) -> None:
    words = [*SCRATCH, "compression.norm_between=true", "trainer.max_epochs=3", "hydra.run.dir=run"]
    assert finish("train", *words, folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    run = tmp_path / "run"
    out = load_compressed(net(), run / "compressed")
    chains = [module for module in out.modules() if isinstance(module, FactorChain)]
    assert {(len(list(chain)), chain.layout.between) for chain in chains} == {(2, "biases")}
    assert len([m for m in out.modules() if isinstance(m, nn.BatchNorm2d)]) == 19
    report = json.loads((run / "report.json").read_text())
    assert report["compressed"]["accuracy"] > 0.3  # of ten digits
    assert report["compressed"]["params"] == sum(p.numel() for p in out.parameters())
    checkpoint = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
    assert any("norm0.running_var" in name for name in checkpoint)
    (entry,) = gather([run])
    assert entry.method == "direct from scratch norms spatial_svd compression_ratio 3"
    assert finish("export", "run", "--to", "pt2", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()


def test_stopped_at_any_moment_it_ends_alike(tmp_path: Path) -> None:
    words = [*LENET, "compression.norm_between=true", "finetune=default", "finetune.epochs=1", "hydra.run.dir=run",
             "trainer.max_epochs=2"]  # fmt: skip
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    assert finish("train", *words, folder=tmp_path / "whole") == 0
    seconds = time.monotonic() - begin
    for number, share in (("kill", 0.2), ("terminate", 0.45), ("kill", 0.7)):
        folder = tmp_path / f"{number}{share}"
        folder.mkdir()
        process = start("train", *words, folder=folder)
        while process.is_alive() and not (folder / "run" / "config.yaml").is_file():
            process.join(0.1)
        process.join(share * seconds)
        getattr(process, number)()
        process.join()
        assert finish("resume", "run", folder=folder) == 0, (folder / "output.txt").read_text()
        assert_same(tmp_path / "whole" / "run", folder / "run")


def test_random_where_nothing_is_trained_and_nearest_elsewhere() -> None:
    assert compression(*SCRATCH).initialize == "variance"
    assert compression("compression=direct", *SMALL).initialize == "weights"
    assert compression(*SCRATCH, "metric=inputs").initialize == "weights"
    assert compression(*SCRATCH, "compression.initialize=weights").initialize == "weights"
    assert compression("compression=reconstruct", "reference=none", *SMALL).initialize == "weights"
    assert OneShot(train=True, initialize=None).settled(True).initialize == "weights"


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    words = [*LENET, "trainer.max_steps=1", "optimizer.lr=1e-9"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert finish("train", *words, f"seed={seed}", f"hydra.run.dir={name}", folder=tmp_path) == 0
    a, b, c = (load_file(tmp_path / name / "compressed/model.safetensors") for name in "abc")
    key = "conv2.0.weight"
    assert torch.equal(a[key], b[key])
    assert not torch.equal(a[key], c[key])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rank=greedy_energy", "`rank` that follows from shapes, such as CompressionRatio, RankFraction or FixedRank"),
        ("decomposition=cheapest rank=cost_penalty", "but got CostPenalty, which looks at weights"),
        ("compression.initialize=random", "Expected `compression.initialize` to be 'weights' or 'variance'"),
        ("compression.norm_between=1", "Expected `compression.norm_between` to be true or false but got 1"),
        (
            "compression.initialize=weights compression.norm_between=true",
            "`compression`: Expected `norm_between` false",
        ),
        ("compression.initialize=variance metric=inputs", "random factors are fitted to nothing"),
        ("compression.initialize=variance compression.train=false", "random factors are fitted to nothing"),
        (
            "reference=default compression.initialize=variance",
            "`compression`: Expected neither a reference nor weights",
        ),
        ("model.weights=w.safetensors compression.initialize=variance", "Expected neither a reference nor weights"),
        ("reference=default compression.norm_between=true", "Train from scratch for it"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(words: str, message: str) -> None:
    with pytest.raises(ValueError, match="Expected") as error:
        check_words([*SCRATCH, *words.split()], "train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "compression" in str(error.value)
