"""Which layers take part, and why the others do not."""

import pytest
import torch
from torch import nn

from lowrank_pl import SVD, FixedRank, SpatialSVD, Targets, compress, make_plan
from lowrank_pl.decompositions import Choice
from lowrank_pl.models import CifarResNet, LeNet300
from lowrank_pl.names import snake_case
from lowrank_pl.tracing import record


def chosen(model: nn.Module, targets: Targets, **options: object) -> list[str]:
    return [c.name for c in make_plan(model, "svd", FixedRank(1), targets, **options).compressions]  # type: ignore[arg-type]


def test_the_papers_nine_layers() -> None:
    """Table 1 of Lee et al.: the convolutions of ResNet-32 with S = 64."""
    names = chosen(CifarResNet(depth=32), Targets(types=["Conv2d"], min_channels=64))
    assert names == [f"layer3.{i}.conv{j}" for i in range(5) for j in (1, 2)][1:]


def test_first_and_last_are_left_out_by_default() -> None:
    plan = make_plan(CifarResNet(depth=8), "svd", FixedRank(1))
    assert plan.dense == {"conv1": "the first convolution", "linear": "the last linear layer"}
    assert chosen(LeNet300(), Targets()) == ["fc1", "fc2"]  # no convolution: nothing is first
    assert chosen(LeNet300(), Targets(skip_last=False)) == ["fc1", "fc2", "fc3"]


def test_first_and_last_that_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3)
            self.neck = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.neck(self.body(self.stem(x)).mean((2, 3))))

    model = Backwards()
    assert chosen(model, Targets()) == ["head", "stem"]  # registration order stands in for the order of running
    assert chosen(model, Targets(), trace=record(model, torch.randn(2, 3, 8, 8))) == ["body", "neck"]


def test_patterns() -> None:
    model = CifarResNet(depth=8)
    assert chosen(model, Targets(include=["layer3.*"])) == ["layer3.0.conv1", "layer3.0.conv2"]
    assert chosen(model, Targets(exclude=["layer[12].*", "*conv2"])) == ["layer3.0.conv1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_named(argument: str) -> None:
    with pytest.raises(ValueError, match=r"'block9\.\*'.*conv1"):
        chosen(CifarResNet(depth=8), Targets(**{argument: ["block9.*"]}))


@pytest.mark.parametrize("options", [{"method": {"block9.*": "svd"}}, {"rank": {"block9.*": FixedRank(1)}}])
def test_and_in_mappings_too(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"block9.*`{next(iter(options))}`"):
        make_plan(CifarResNet(depth=8), **options)


def test_mappings_take_the_first_match_and_leave_the_rest_dense() -> None:
    model = CifarResNet(depth=8)
    rank = {"layer3.*": FixedRank(3), "*conv1": FixedRank(2)}
    plan = make_plan(model, {"*conv2": SVD(), "*": "spatial_svd"}, rank)
    assert plan.choose_ranks() == {
        "layer1.0.conv1": Choice(SpatialSVD(), (2,)),
        "layer2.0.conv1": Choice(SpatialSVD(), (2,)),
        "layer3.0.conv1": Choice(SpatialSVD(), (3,)),
        "layer3.0.conv2": Choice(SVD(), (3,)),
    }
    assert plan.dense["layer1.0.conv2"] == "no pattern in `rank` matches it"
    assert {type(c.method).__name__ for c in plan.compressions} == {"SVD", "SpatialSVD"}


def test_frozen_layers_are_skipped_in_training_only() -> None:
    model = LeNet300()
    model.fc1.weight.requires_grad_(False)
    assert make_plan(model, "svd", training=True).dense["fc1"] == "frozen: requires_grad is False"
    assert "fc1" not in make_plan(model, "svd").dense


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"include": "layer*"}, TypeError),
        ({"exclude": [3]}, TypeError),
        ({"types": ["Conv4d"]}, ValueError),
        ({"min_channels": -1}, ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        Targets(**arguments)  # type: ignore[arg-type]


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match="block_svd, cheapest, cp, first_of, low_rank_plus_columns, low_rank_plus_sparse, separable_svd, "
        "spatial_svd, svd, tensor_train, tiled_svd, tucker2",
    ):
        compress(LeNet300(), "svdd")
    with pytest.raises(TypeError, match="FixedRank"):
        compress(LeNet300(), "svd", rank=8)
    with pytest.raises(TypeError, match="`targets` to be Targets"):
        compress(LeNet300(), "svd", targets=["fc1"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`model` to be a module"):
        compress(LeNet300)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not run on argument `example_input`"):
        compress(LeNet300(), example_input=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="CompressionRatio"):
        compress(LeNet300(), "svd", rank="compression_ratio")


@pytest.mark.parametrize(
    ("name", "snake"), [("TiledSVD", "tiled_svd"), ("SVD", "svd"), ("Tucker2", "tucker2"), ("EVBMF", "evbmf")]
)
def test_snake_case(name: str, snake: str) -> None:
    assert snake_case(name) == snake


def test_what_does_not_get_cheaper_stays_dense() -> None:
    """Rank 100: 108,400 of 235,200 weights in fc1, but 40,000 of 30,000 in fc2."""
    plan = make_plan(LeNet300(), "svd", FixedRank(100))
    rows = plan.rows(plan.choose_ranks())
    assert [(row.structure, row.weights) for row in rows] == [("svd", 108_400), ("dense", 30_000), ("dense", 1_000)]
    assert rows[1].note == "svd of rank 100 has 40,000 weights"


def test_an_embedding_is_no_last_linear_layer():
    """Registered, or run, behind the head."""
    net = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4), "table": nn.Embedding(10, 8)})
    assert make_plan(net, "svd", FixedRank(1)).dense["head"] == "the last linear layer"
