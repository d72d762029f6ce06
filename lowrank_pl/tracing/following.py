"""What is done to a layer's output, element by element, before anything else happens to it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lowrank_pl.adapters import find_maps

Following: TypeAlias = Callable[[Tensor], Tensor]

_ELEMENTWISE = {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.leaky_relu,
    F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.softplus,
    torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.tanh, Tensor.tanh, F.tanh,
}  # fmt: skip


def what_follows(model: nn.Module, names: Collection[str], run: Callable[[], Any]) -> dict[str, Following]:
    """For the layers of these names that batch norm or an activation follows: both, as one function of rows
    `[n, channels]`; as the model, in evaluation mode, is seen to `run` with a small batch.

    A layer whose output goes to several places, or runs several times, has none.
    """
    maps = {name: each for name, each in find_maps(model).items() if name in names and each.is_layer}
    with ExitStack() as stack:
        listener = stack.enter_context(_Listener())
        for name, each in maps.items():
            stack.callback(each.module.register_forward_hook(partial(listener.start, name)).remove)
        run()
    return {name: _chain(steps) for name, steps in listener.steps.items() if steps and name not in listener.several}


class _Listener(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[Following]] = {}
        self.several: set[str] = set()
        self._open: dict[int, tuple[str, Tensor]] = {}  # the newest value of every layer, by its identity
        self._used: set[int] = set()

    def start(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in self.steps:
            self.several.add(name)
        elif isinstance(output, Tensor):
            self.steps[name] = []
            self._open[id(output)] = name, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and self._is_open(x)]
        output = func(*args, **kwargs)
        if not seen or not isinstance(output, Tensor):  # a shape, perhaps
            return output
        name = self._open[id(seen[0])][0]
        if id(seen[0]) in self._used:
            self.several.add(name)
        elif len(seen) == 1 and seen[0] is args[0] and _is_elementwise(func, args, kwargs):
            if output is not args[0]:
                self._used.add(id(args[0]))
            self.steps[name].append(_step(func, args[1:], kwargs))
            self._open[id(output)] = name, output
        else:  # what is between layers, from here on
            for x in seen:
                self._open.pop(id(x), None)
        return output

    def _is_open(self, x: Tensor) -> bool:
        return id(x) in self._open and self._open[id(x)][1] is x


def _is_elementwise(func: Any, args: Any, kwargs: Any) -> bool:
    if func is F.batch_norm:  # with statistics of its own, not of the batch
        return args[1] is not None and not kwargs.get("training", any(args[5:6]))
    return func in _ELEMENTWISE


def _step(func: Any, args: Any, kwargs: Any) -> Following:
    def step(y: Tensor) -> Tensor:
        own_args, own_kwargs = tree_map_only(Tensor, lambda x: x.to(y.dtype), (args, kwargs))
        return func(y.clone(), *own_args, **own_kwargs)  # type: ignore[no-any-return]  # a copy: it may write to it

    return step


def _chain(steps: list[Following]) -> Following:
    def follow(y: Tensor) -> Tensor:
        for step in steps:
            y = step(y)
        return y

    return follow
