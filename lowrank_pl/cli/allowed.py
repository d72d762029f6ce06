"""What a stored config may call. A config is a file from elsewhere, and `_target_` runs code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

# Classes that these modules (and the modules in them) define themselves, and these very functions and classes.
_MODULES = (
    "lowrank_pl.costs", "lowrank_pl.data", "lowrank_pl.decompositions", "lowrank_pl.models", "lowrank_pl.ranks",
    "lowrank_pl.runs.recipe", "lowrank_pl.targets", "torch.optim",
)  # fmt: skip
_EXACT = (
    "lowrank_pl.callbacks.admm.ADMM",
    "lowrank_pl.callbacks.deeptwist.DeepTwist",
    "lowrank_pl.callbacks.learning_compression.LearningCompression",
    "lowrank_pl.models.torchvision_classifier.torchvision_classifier",
    "lowrank_pl.one_shot.compress",
    "lowrank_pl.runs.one_shot.OneShot",
    "lowrank_pl.schedules.constant",
    "lowrank_pl.schedules.cosine",
    "lowrank_pl.schedules.exponential",
    "lowrank_pl.schedules.step_decay",
    "pytorch_lightning.loggers.mlflow.MLFlowLogger",
    "pytorch_lightning.loggers.tensorboard.TensorBoardLogger",
    "pytorch_lightning.loggers.wandb.WandbLogger",
    "pytorch_lightning.trainer.trainer.Trainer",
)


def check_targets(config: Any, allow: Iterable[str] = ()) -> None:
    """Raise `ValueError` for a config whose `_target_`s are not on the list, to which `allow` adds names.

    The object that is found counts, not the name it was found by: `pytorch_lightning.loggers.os.system` is `os.system`.
    Nothing is imported but the modules on the list, those in them, and the packages that they lie in.
    """
    exact, modules = set(_EXACT), set(_MODULES)
    for name in allow:
        try:
            found = _find(name, lambda module: True)
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"--allow {name}: {error}. Expected the full name of a class, function or module"
            ) from error
        (modules if isinstance(found, ModuleType) else exact).add(_true_name(found))
    for key, name in _targets(OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config):
        _check(key, name, exact, modules, bool(allow))


def _check(key: str, name: Any, exact: set[str], modules: set[str], extended: bool) -> None:
    reason = "is not on the list of what a stored config may call"

    def may_import(module: str) -> bool:
        inside = any(module == own or module.startswith(f"{own}.") for own in modules)
        return inside or any(own.startswith(f"{module}.") for own in (*exact, *modules))

    try:
        found = _find(name, may_import)
    except _NotListed:
        found = None
    except (ImportError, AttributeError, TypeError) as error:
        found, reason = None, f"was not found ({error})"
    true_name = _true_name(found)
    own = inspect.isclass(found) and any(found.__module__ == m or found.__module__.startswith(f"{m}.") for m in modules)
    if found is not None and (own or true_name in exact) and _at_home(found):
        return
    also = f", which is {true_name}," if found is not None and true_name != name else ""
    raise ValueError(
        f"`{key}`: {name!r}{also} {reason}. If you trust it, add --allow {name}"
        + ("" if extended else "; nothing was run")
    )


class _NotListed(ImportError):
    """To look there, a module would be imported, and run, that is not on the list."""


def _find(name: Any, may_import: Callable[[str], bool]) -> Any:
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise TypeError(f"expected a dotted name, got {name!r}")
    root, *parts = name.split(".")
    if not may_import(root):
        raise _NotListed(f"no name that begins with {root} is on the list")
    found: Any = import_module(root)
    for part in parts:
        if not isinstance(found, (ModuleType, type)):  # of other objects an attribute may be computed
            raise TypeError(f"{part} is looked for in what is neither a module nor a class")
        # what is not there yet may be a module of this package, never one that the package has merely imported
        if not hasattr(found, part) and isinstance(found, ModuleType) and hasattr(found, "__path__"):
            module = f"{found.__name__}.{part}"
            if not may_import(module):
                raise _NotListed(f"{module} is not on the list")
            import_module(module)
        found = getattr(found, part)
    return found


def _at_home(found: Any) -> bool:
    """Whether it is what its own names say, not something that borrows them."""
    home: Any = sys.modules.get(found.__module__)
    for part in found.__qualname__.split("."):
        home = getattr(home, part, None)
    return home is found


def _true_name(found: Any) -> str:
    if isinstance(found, ModuleType):
        return found.__name__
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', '?')}"


def _targets(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        if "_target_" in values:
            yield f"{prefix}_target_", values["_target_"]
        for key, value in values.items():
            yield from _targets(value, f"{prefix}{key}.")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _targets(value, f"{prefix}{index}.")
