"""Training in several processes: the only place that knows `torch.distributed`. Alone, everything is a no-op."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_parallel() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) for one alone."""
    return (dist.get_rank(), dist.get_world_size()) if is_parallel() else (0, 1)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, on all of them; it runs there alone.

    Decompositions differ in their last bits between machines, so that two processes that decide by a threshold can
    disagree: one decides, the others receive. What `make` raises is raised on all of them.
    """
    if not is_parallel():
        return make()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # of any kind: the others wait, and must hear of it
            outcome[1] = _sendable(error)
    dist.broadcast_object_list(outcome, src=0)
    value, problem = outcome
    if problem is not None:
        raise problem
    return cast(T, value)


def _sendable(error: Exception) -> Exception:
    """The error, or, where it does not survive pickling, one with its words: the others would wait for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind: what a class of somebody else does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@torch.no_grad()
def equalize_(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's numbers, in place."""
    if is_parallel():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


@torch.no_grad()
def add_up_(tensors: Iterable[Tensor]) -> None:
    """Their sums over all processes, in place; the same bits in all of them."""
    if is_parallel():
        for tensor in tensors:
            dist.all_reduce(tensor.detach())
