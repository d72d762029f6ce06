"""Inputs of a network from anybody's loader, in the same order in every pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from lowrank_pl.checks import check_int
from lowrank_pl.tracing import Call
from lowrank_pl.tracing.calls import leaves

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
HELD_OUT = 6  # of so many batches one is held back
_END = object()


@final
@dataclass(frozen=True)
class Samples:
    """What second moments are taken from: batches of a `loader`, whole ones, until they hold `count` inputs (None: all
    of them).

    Of a batch that is a tuple or a list the first item is the network's input, of a mapping what its forward has names
    for, labels or not; `forward(model, batch)` says otherwise. Of each image or sequence at most `places` positions are
    taken. Every sixth batch is held back, to measure errors on, and not counted; at least one, where the loader has one
    more than is needed. `loss(model, batch)` is needed where
    gradients are. Loaders that shuffle give the same batches in every pass, as far as PyTorch's random numbers decide;
    an iterator, which runs once, is refused.
    """

    loader: Iterable[Any]
    count: int | None = None
    places: int | None = 10
    forward: Forward | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        expected = "Expected argument `data` to be a DataLoader or a list of batches, or Samples(loader, ...)"
        if not isinstance(self.loader, Iterable) or isinstance(self.loader, (Tensor, Mapping, str, nn.Module)):
            kind = type(self.loader).__name__
            one = ": give [batch] for a single one" if isinstance(self.loader, (Tensor, Mapping)) else ""
            raise TypeError(f"{expected}, but got a {kind}{one}")
        if isinstance(self.loader, Iterator):
            raise TypeError(
                "Expected argument `data` to be a DataLoader or a list of batches, which can be gone through again, "
                f"but got an iterator, a {type(self.loader).__name__}"
            )
        if _length(self.loader) == 0:
            raise ValueError("Expected argument `data` to hold batches but it is empty")
        for name, value in (("count", self.count), ("places", self.places)):
            if value is not None:
                check_int(name, value, 1)
        for name, function in (("forward", self.forward), ("loss", self.loss)):
            if function is not None and not callable(function):
                raise TypeError(f"Expected argument `{name}` to be a function of model and batch but got {function!r}")

    @classmethod
    def of(cls, data: Any) -> Samples:
        """These, or those of a loader."""
        return data if isinstance(data, Samples) else cls(data)

    def batches(self) -> Iterator[tuple[int, bool, Any]]:
        """One pass: the number of each batch, whether it is held back, and the batch. Random numbers are the loader's
        own while it makes a batch, and the caller's in between. Raises `ValueError` where there is no batch."""
        states = [g.get_state() for g in self._generators]
        states[0] = torch.Generator().manual_seed(0).get_state()
        seen, number, is_any_held = 0, 0, False
        with self._in(states):
            batches = iter(self.loader)
        while not is_any_held or self.count is None or seen < self.count:
            with self._in(states):
                batch = next(batches, _END)
            if batch is _END:
                break
            held = number % HELD_OUT == HELD_OUT - 1 or (self.count is not None and seen >= self.count)
            is_any_held = is_any_held or held
            yield number, held, batch
            number += 1
            seen += 0 if held or self.count is None else _size(batch)
        if number == 0:
            raise ValueError(
                "Expected argument `data` to hold batches, in every pass, but it is empty (or can be gone through once)"
            )

    @property
    def _generators(self) -> list[torch.Generator]:
        """PyTorch's, and those that the loader has of its own."""
        sampler = getattr(self.loader, "batch_sampler", None)
        holders = (self.loader, sampler, getattr(self.loader, "sampler", None), getattr(sampler, "sampler", None))
        own = [getattr(holder, "generator", None) for holder in holders]
        found = {id(g): g for g in (torch.default_generator, *own) if isinstance(g, torch.Generator)}
        return list(found.values())

    @contextmanager
    def _in(self, states: list[Tensor]) -> Iterator[None]:
        """With these states of the generators, which go on; then with those of before."""
        generators = self._generators
        kept = [g.get_state() for g in generators]
        try:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)
            yield
            states[:] = [g.get_state() for g in generators]
        finally:
            for g, state in zip(generators, kept, strict=True):
                g.set_state(state)

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
    call = by_keywords(model, batch)
    if not isinstance(call, Call):
        names = ", ".join(p.name for p in _parameters(model))
        raise ValueError(
            f"Expected batches of `data` with what {type(model).__name__}.forward takes ({names}) but they hold "
            f"{', '.join(map(str, batch))}: give Samples(loader, forward=lambda model, batch: ...)"
        )
    return call


def by_keywords(model: nn.Module, example: Any) -> Any:
    """A mapping as a call with what the network's forward has names for, if there is any; all else as it is."""
    if not isinstance(example, Mapping):
        return example
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return Call((), dict(example))
    known = {name: value for name, value in example.items() if name in {p.name for p in parameters}}
    return Call((), known) if known else example


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    written: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped takes anything
    return list(inspect.signature(written.forward).parameters.values())


def _length(loader: Iterable[Any]) -> int | None:
    """How many batches, where it can be told: a DataLoader of a stream has a length that raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _size(batch: Any) -> int:
    """How many inputs a batch holds: the leading size of the first of its tensors that has one."""
    if isinstance(batch, Call) and batch.batch is not None:
        return batch.batch
    return next((x.shape[0] for x in leaves(batch) if isinstance(x, Tensor) and x.dim()), 1)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Call):
        return Call(_moved(value.args, device), _moved(value.kwargs, device), value.batch)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        moved: Sequence[Any] = [_moved(item, device) for item in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    return value
