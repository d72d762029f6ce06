"""What a configuration may say. It is checked whole before anything runs: every key, and every value's type and range.

The arguments of what a `_target_` names are its own signature; pydantic compares values with its annotations. What
libraries take as it comes, and stumble over hours later, has a line in `_STRICTER`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from torch import nn
from torch.optim import Optimizer

from lowrank_pl import schedules
from lowrank_pl.cli.configs import close_to, options, shown
from lowrank_pl.methods.reconstruct import Mode
from lowrank_pl.runs import Phase, Training


def _growing(values: list[float]) -> list[float]:
    if values != sorted(values):
        raise ValueError("Input should be numbers that grow")
    return values


def _left_out(why: str) -> Any:
    def refuse(value: Any) -> Any:
        raise ValueError(f"Input should be left out, because {why},")

    return Annotated[Any, AfterValidator(refuse)]


def _limit(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError("Input should be at least 1, or -1 for no limit,")
    return value


_Flag = bool
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Conversion = Literal["none", "partial", "object", "all"]
_Part = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
_Count = Annotated[int, Field(ge=0)]
_Natural = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Limit = Annotated[int, AfterValidator(_limit)]
_Node = dict[str, Any]  # checked by itself
_Never = _left_out("a run sets it itself")
_FromData = _left_out("it follows from the data")
# of which it is already hard to say what a weight of 1 becomes; more is a slip of the pen
_Rate = Annotated[float, Field(gt=0, le=1e6)]

_TOP = {
    "model": _Node,
    **dict.fromkeys(
        ("data", "compression", "decomposition", "rank", "cost", "targets", "optimizer", "scheduler"), _Node
    ),
    **dict.fromkeys(("trainer", "reference", "finetune", "logger", "paths", "reconstruct"), _Node),
    "metric": Literal["weights", "inputs", "inputs_and_gradients"],
    "seed": _Seed,
    "channels_last": _Flag,
    "label_smoothing": _Share,
    "product_decay": _Number,
    "checkpoint_every": _Natural | None,
    "report_train": _Flag,
}
# which runs of versions 0.1.0 and 0.2.0 need not have
_LATER = ("decomposition", "rank", "cost", "targets", "product_decay", "metric", "reconstruct")
_RECONSTRUCT = {"mode": Mode | None, "samples": _Natural, "places": _Natural | None, "recalibrate_bn": _Flag}
_NEEDED = ("model.net", "data", "optimizer", "scheduler", "trainer")  # groups that cannot be off
_OFF = ("compression", "targets", "cost", "reference", "finetune", "logger")  # those that are empty where they are off

_STRICTER: dict[Any, dict[str, Any]] = {
    Optimizer: {
        "lr": _Rate,
        "momentum": _Share,
        "dampening": _Number,
        "weight_decay": _Number,
        "eps": _Number,
        "betas": tuple[_Share, _Share],
    },
    pl.Trainer: {
        "max_epochs": _Limit | None,
        "max_steps": _Limit,
        "min_epochs": _Count | None,
        "min_steps": _Count | None,
        "accumulate_grad_batches": _Natural,
        "gradient_clip_val": _Number | None,
        "log_every_n_steps": _Natural,
        "check_val_every_n_epoch": _Natural | None,
        **dict.fromkeys(("limit_train_batches", "limit_test_batches"), _Part | None),
        "val_check_interval": _Part | None,
        "num_sanity_val_steps": Annotated[int, Field(ge=-1)] | None,
        "overfit_batches": _left_out("a run draws its batches itself (see limit_train_batches)"),
        **dict.fromkeys(("callbacks", "logger", "plugins", "default_root_dir", "fast_dev_run"), _Never),
        "enable_checkpointing": _Never,
    },
    pl.LightningDataModule: {"batch_size": _Size, "eval_batch_size": _Size, "seed": _Seed},
    nn.Module: {"dropout": Annotated[float, Field(ge=0, le=1)]},
    Training: {"epochs": _Natural | None, "product_decay": _Number},
    Phase: {"epochs": _Natural, "lr_factor": _Rate},
    schedules.exponential: {"gamma": _Positive},
    schedules.step_decay: {"gamma": _Positive, "milestones": Annotated[list[_Number], AfterValidator(_growing)]},
}
_UNITS = {
    "checkpoint_every": "optimizer steps", "milestones": "epochs", "epochs": "epochs", "size": "pixels",
    "samples": "images",
}  # fmt: skip
_LOGGERS = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "MLFlowLogger": ("mlflow",),
}


def check_config(config: DictConfig) -> None:
    """Raise `ValueError` that names the first key that is unknown, missing, or has a value that makes no sense.

    What the config names is looked up, and so imported: `check_targets` comes before, where others wrote the config.
    """
    values: Any = OmegaConf.to_container(config, resolve=False)
    for name in _TOP:
        if values.get(name) is None and name not in (*_LATER, "checkpoint_every"):
            raise ValueError(f"Expected `{name}` to have a value{_choice(name)}")
    _check_values("", values, _TOP)
    _check_values("model.", values["model"], {"net": _Node, "weights": str | None})
    _check_values("paths.", values["paths"], {"data": str, "references": str | None})
    _check_values("reconstruct.", values.get("reconstruct") or {}, _RECONSTRUCT)
    for name in _OFF:
        for key in values.get(name) or () if "_target_" not in (values.get(name) or ()) else ():
            raise ValueError(f"Expected no key `{name}.{key}`, because `{name}` is off{_choice(name)}")
    for name in _NEEDED:
        node = OmegaConf.select(config, name)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ValueError(f"Expected `{name}` to have a `_target_`{_choice(name)}")
    for key, node in sorted(nodes(values), key=lambda pair: pair[0].count(".")):  # what others repeat comes first
        _check_node(f"{key}.", node)
    _check_ends(values["trainer"])
    _check_use(values)


def _check_use(values: dict[str, Any]) -> None:
    for key in ("mode", "recalibrate_bn"):
        value = (values.get("reconstruct") or {}).get(key)
        if value and "reconstruct" not in values["compression"]:
            raise ValueError(
                f"Expected no `reconstruct.{key}` {shown(value)} with the chosen `compression`, which does not look at "
                "it: choose compression=reconstruct or direct"
            )


def _check_ends(trainer: dict[str, Any]) -> None:
    for unit, default in (("epochs", None), ("steps", -1)):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}", default)
        if least is not None and most not in (None, -1) and least > most:
            raise ValueError(
                f"Expected `trainer.min_{unit}` to be at most `trainer.max_{unit}`, {most}, but got {least}"
            )


def nodes(values: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """What is made of a config: its mappings with `_target_`, outer ones first, each with its key."""
    if isinstance(values, dict) and "_target_" in values:
        yield key, values
    if isinstance(values, (dict, list)):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from nodes(value, f"{key}.{name}" if key else str(name))


def _check_node(prefix: str, node: dict[str, Any]) -> None:
    target = node["_target_"]
    try:
        function = _locate(target)  # `get_object` without its log
    except Exception:  # whatever an import raises
        function = None
    if not callable(function):
        raise ValueError(f"Expected `{prefix}_target_` to name a class or a function but got {target!r}")
    kinds, is_open = arguments(function)
    for kind, stricter in _STRICTER.items():
        if function is kind or (inspect.isclass(kind) and inspect.isclass(function) and issubclass(function, kind)):
            kinds |= {name: stricter[name] for name in kinds.keys() & stricter.keys()}
    if prefix == "model.net.":
        kinds |= dict.fromkeys(("input_shape", "num_classes"), _FromData)
    own = {"_target_": str, "_partial_": _Flag, "_args_": list[Any], "_convert_": _Conversion, "_recursive_": _Flag}
    _check_values(prefix, node, {**kinds, **own}, is_open)
    # to which a run gives what is left: weights, an optimizer, a module
    part = prefix[:-1].rpartition(".")[2]
    may_wait = part in ("optimizer", "scheduler", "trainer", "logger")
    if node.get("_partial_") and not may_wait and (part != "compression" or inspect.isclass(function)):
        raise ValueError(f"Expected no `{prefix}_partial_`: a run makes it at once")
    packages = _LOGGERS.get(getattr(function, "__name__", ""), ())
    if packages and not any(find_spec(package) for package in packages):
        raise ValueError(f"`{prefix[:-1]}`: {packages[0]} is not installed: pip install {packages[0]}")


def arguments(function: Any) -> tuple[dict[str, Any], bool]:
    """The arguments of a function or class by name, with their annotations, and whether it takes others too.

    Those that a class passes on to the class it is derived from are included.
    """
    if not inspect.isclass(function):
        return _own_arguments(function)
    kinds: dict[str, Any] = {}
    for home in function.__mro__[:-1]:
        if "__init__" in vars(home):
            own, is_open = _own_arguments(vars(home)["__init__"])
            kinds = {**own, **kinds}
            if not is_open:
                return kinds, False
    return kinds, bool(kinds)  # nobody is left who could refuse one


def _own_arguments(function: Any) -> tuple[dict[str, Any], bool]:
    try:
        hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError):  # annotations that are for type checkers alone
        hints = {}
    kinds: dict[str, Any] = {}
    is_open = False
    for name, parameter in list(inspect.signature(function).parameters.items()):
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            fields = [inner for inner in get_args(hint) if hasattr(inner, "__total__")]  # **settings: Unpack[Fields]
            kinds |= {key: kind for inner in fields for key, kind in get_type_hints(inner).items()}
            is_open = not fields
        elif parameter.kind is not parameter.VAR_POSITIONAL and name != "self":
            kinds[name] = hint
    return kinds, is_open


def _check_values(prefix: str, values: dict[str, Any], kinds: Mapping[str, Any], is_open: bool = False) -> None:
    for name, value in values.items():
        if name in kinds:
            if not any(nodes(value)):
                _check_value(f"{prefix}{name}", value, kinds[name])
        elif not is_open:
            known = [f"{prefix}{kind}" for kind in kinds if not kind.startswith("_")]
            close = close_to(f"{prefix}{name}", known)
            raise ValueError(f"Expected no key `{prefix}{name}`" + (close or f"; there are: {', '.join(known)}"))


def _check_value(key: str, value: Any, kind: Any) -> None:
    if value == "???":
        raise ValueError(f"Expected `{key}` to have a value: give {key}=...")
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False))
    except PydanticUserError:  # not a type of plain values: it says itself what it takes
        return
    try:
        adapter.validate_json(json.dumps(value))  # of which a tuple may be a list, and 1 a float, but "1" no number
    except ValidationError as error:
        plain = [each["msg"] for each in error.errors(include_url=False) if each["type"] != "needs_python_object"]
        expected = list(dict.fromkeys(_expected(message) for message in plain or ["made by a `_target_`"]))
        expected += ["null"] * (get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind))
        unit = _UNITS.get(key.rpartition(".")[2])
        units = f" ({unit})" if unit else ""
        hint = _choice(key) if kind is _Node else ""
        raise ValueError(
            f"Expected `{key}` to be {' or '.join(expected)}{units} but got {shown(value)}{hint}"
        ) from error


_WORDS = {
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
    "a valid list": "a list",
    "a valid array": "a list",
    "an object": "a mapping",
}


def _expected(message: str) -> str:
    words = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return _WORDS.get(words, words.replace("greater than or equal to", "at least").replace("greater than", "above")
                      .replace("less than or equal to", "at most").replace("less than", "below"))  # fmt: skip


def _choice(group: str) -> str:
    names = options(group.partition(".")[0])
    return f": choose {group.partition('.')[0]}={', '.join(names)}" if names else ""
