"""Every configuration composes, and what it names exists."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lowrank_pl import SVD, Targets, Tucker2, make_plan
from lowrank_pl.cli.allowed import check_targets
from lowrank_pl.cli.configs import resolved
from lowrank_pl.cli.schema import check_config

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*/cells.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("hydra", "__pycache__")
)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lowrank_pl.conf", version_base="1.3"):
        return compose("train", [*overrides, "paths.data=/data"])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_names_real_arguments(option: str) -> None:
    extra = ["data.file=images.npz"] if option == "data=arrays" or option == "experiment=deeptwist_cifar10" else []
    extra += ["logger.tracking_uri=x"] if option == "logger=mlflow" else []
    extra += ["compression=direct"] if option.startswith("reconstruct=") else []  # which others do not look at
    config = composed(option, *extra)
    check_targets(config)  # a run with it can be resumed
    name = option.partition("=")[2]
    if option.partition("=")[0] != "logger" or name == "csv" or find_spec(name):
        check_config(resolved(config))
    for node in nodes(config):
        target = str(node["_target_"])
        function = get_class(target) if target.rsplit(".", 1)[1][0].isupper() else get_method(target)
        accepted = inspect.signature(function).parameters
        keywords = {key for key in node if not str(key).startswith("_")}
        assert keywords <= set(accepted) or any(p.kind is p.VAR_KEYWORD for p in accepted.values())


def nodes(config: DictConfig) -> list[DictConfig]:
    found = [config] if "_target_" in config else []
    for key in config:
        if isinstance(config[key], DictConfig):
            found += nodes(config[key])
    return found


def test_the_default_is_the_promised_one() -> None:
    callback = instantiate(composed().compression, _convert_="all")
    assert type(callback).__name__ == "DeepTwist"
    assert callback.S_D == 20
    assert type(callback.method).__name__ == "BlockSVD"
    assert callback.rank.x == 3.0
    assert composed().model.net.depth == 20


def test_mappings_of_layers_to_choices_come_through_a_config_file() -> None:
    written = "{method: {'*conv1': svd, '*': tucker2}, rank: {'*': {_target_: lowrank_pl.FixedRank, r: 2}}}"
    config = composed()
    config.compression.method, config.compression.rank = None, None
    callback = instantiate(OmegaConf.merge(config.compression, OmegaConf.create(written)), _convert_="all")
    assert list(callback.method) == ["*conv1", "*"]
    assert callback.rank["*"].r == 2


@pytest.mark.parametrize("words", ["compression.method=[tucker2,svd]", "decomposition=first_of"])
def test_an_order_of_methods_comes_through_the_command_line(words: str) -> None:
    config = composed(words)
    check_targets(config)
    callback = instantiate(config.compression, _convert_="all")
    net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.Linear(8, 8))
    plan = make_plan(net, callback.method, targets=Targets(skip_first=False, skip_last=False))
    assert [c.method for c in plan.compressions] == [Tucker2(), SVD()]


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("rank=cost_budget rank.of=layers", "rank=cost_budget rank.of=all"),
        ("rank=greedy_energy rank.of=layers", "rank=greedy_energy rank.of=1"),
        ("compression=lc_budget compression.budget.of=layers", "compression=lc_budget compression.budget.of=null"),
        ("compression.batch_size=4", "compression.batch_size=four"),
        ("compression=lc compression.batch_size=4", "compression=lc compression.batch_size=1.5"),
    ],
)
def test_what_a_budget_is_of_and_how_large_a_batch_is(words: str, refused: str) -> None:
    check_config(resolved(composed(*words.split())))
    with pytest.raises(ValueError, match=r"Expected `(rank|compression)\.(of|budget\.of|batch_size)` to be"):
        check_config(resolved(composed(*refused.split())))


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="compression\\.SD"):
        composed("compression.SD=3")


@pytest.mark.parametrize("cells", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_every_cell_of_an_experiment_composes(cells: Path) -> None:
    spec = OmegaConf.to_container(OmegaConf.load(cells))
    for words in spec["cells"].values():
        first, _, rest = words.partition(" ")
        overrides = f"{spec['groups'][first]} {rest}" if first in spec.get("groups", {}) else words
        command = f"{spec['command']} {overrides}".format(data="/data", weights="/weights", runs="/runs")
        config = composed(*command.split())
        assert config.seed in (0, 1, 2)
        check_config(resolved(config))
