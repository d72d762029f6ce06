"""Inputs of a network from anybody's loader, in the same order in every pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from lowrank_pl.checks import check_int
from lowrank_pl.tracing import Call, count_inputs

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
HELD_OUT = 6  # of so many batches one is held back


@final
@dataclass(frozen=True)
class Samples:
    """What second moments are taken from: batches of a `loader`, the first `count` inputs of it (None: all).

    Of a batch that is a tuple or a list the first item is the network's input, of a mapping what its forward has names
    for, labels or not; `forward(model, batch)` says otherwise. Of each image or sequence at most `places` positions are
    taken. Every sixth batch is held back, to measure errors on. `loss(model, batch)` is needed where gradients are.
    Loaders that shuffle give the same batches in every pass, as far as PyTorch's random numbers decide; an iterator,
    which runs once, is refused.
    """

    loader: Iterable[Any]
    count: int | None = None
    places: int | None = 10
    forward: Forward | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loader, Iterable) or isinstance(self.loader, (Tensor, Mapping, str)):
            raise TypeError(
                "Expected argument `data` to be a DataLoader or a list of batches, or Samples(loader, ...), but got a "
                f"{type(self.loader).__name__}"
            )
        if isinstance(self.loader, Iterator):
            raise TypeError(
                f"Expected argument `data` to be a DataLoader or a list of batches, which can be gone through again, "
                f"but got an iterator, a {type(self.loader).__name__}"
            )
        if isinstance(self.loader, Sized) and len(self.loader) == 0:
            raise ValueError("Expected argument `data` to hold batches but it is empty")
        for name, value in (("count", self.count), ("places", self.places)):
            if value is not None:
                check_int(name, value, 1)

    @classmethod
    def of(cls, data: Any) -> Samples:
        """These, or those of a loader."""
        return data if isinstance(data, Samples) else cls(data)

    def batches(self) -> Iterator[tuple[int, bool, Any]]:
        """One pass: the number of each batch, whether it is held back, and the batch. Raises `ValueError` where there
        is none."""
        generator = getattr(self.loader, "generator", None)
        own = generator if isinstance(generator, torch.Generator) else torch.Generator()
        kept = own.get_state()
        seen, number = 0, -1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for number, batch in enumerate(self.loader):
                held = number % HELD_OUT == HELD_OUT - 1
                yield number, held, batch
                seen += 0 if held or self.count is None else count_inputs(batch)
                if self.count is not None and seen >= self.count:
                    break
        own.set_state(kept)
        if number < 0:
            raise ValueError("Expected argument `data` to hold batches but it is empty")

    @staticmethod
    def moved(batch: Any, device: torch.device) -> Any:
        """A batch on that device."""
        return _moved(batch, device)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The network on a batch, on its own device."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        batch = self.moved(batch, device)
        if self.forward is not None:
            return self.forward(model, batch)
        call = as_call(model, batch)
        return model(*call.args, **call.kwargs)


def as_call(model: nn.Module, batch: Any) -> Call:
    """How a network is called with a batch that may hold labels too."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return Call((batch,))
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return Call((), dict(batch))
    known = {name: value for name, value in batch.items() if name in {p.name for p in parameters}}
    if not known:
        raise ValueError(
            f"Expected batches of `data` with what {type(model).__name__}.forward takes "
            f"({', '.join(p.name for p in parameters)}) but they hold {', '.join(map(str, batch))}: give "
            "Samples(loader, forward=lambda model, batch: ...)"
        )
    return Call((), known)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Call):
        return Call(_moved(value.args, device), _moved(value.kwargs, device), value.batch)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(item, device) for item in value]
    return value
