"""What a module was called with, and how many inputs of the network that holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

SAMPLES = 2  # inputs kept per layer, to verify the extracted layer on


@dataclass(frozen=True)
class Call:
    """What a module was called with, and how many inputs that holds, where it is known."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None

    @classmethod
    def of(cls, example_input: Any) -> Call:
        """A tuple of arguments, or the only argument; a call, with its keywords, is one already."""
        if isinstance(example_input, Call):
            return example_input
        return cls(example_input if isinstance(example_input, tuple) else (example_input,))


def count_inputs(batch: Any, given: int | None = None) -> int:
    """How many inputs of the network a batch holds: the leading size of its tensors, unless it is given.

    Raises `ValueError` where they differ, or where there are none.
    """
    given = batch.batch if isinstance(batch, Call) else given
    if given is not None:
        return given
    sizes = sorted({x.shape[0] for x in leaves(batch) if isinstance(x, Tensor) and x.dim()})
    if len(sizes) != 1 or sizes[0] == 0:
        which = f"have the leading sizes {', '.join(map(str, sizes[:6]))}" if sizes else "are missing"
        raise ValueError(
            f"Expected a batch whose size can be told, but its tensors {which}: give `batch_size`, the number of inputs"
        )
    return sizes[0]


def leaves(value: Any) -> Iterator[Any]:
    """What containers hold: also dataclasses and mappings such as Hugging Face's, which PyTorch's trees do not know."""
    if isinstance(value, Call):
        value = (value.args, value.kwargs)
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


def few(call: Call, batch: int) -> Call | None:
    """A copy of a call with a few of the batch's inputs; None where it holds what cannot be copied, or no tensor of the
    batch's size: frames that are folded into the batch, say, of which nobody can tell which belong to an input."""
    held = list(leaves(call))
    if not all(isinstance(x, _PLAIN) for x in held):
        return None
    if not any(isinstance(x, Tensor) and batch in x.shape[:2] for x in held):
        return None
    return with_inputs(call, batch, min(SAMPLES, batch))


def with_inputs(call: Call, batch: int, count: int) -> Call:
    """A copy of a call on a batch of so many inputs, with `count` of them, repeated as needed. A tensor holds inputs
    along its first axis or, sequence first, its second, if that has the batch's size; else it is the same for all."""

    def resized(x: Tensor) -> Tensor:
        axes = [axis for axis, n in enumerate(x.shape[:2]) if n == batch]
        places = torch.arange(count, device=x.device) % batch
        return x.detach().index_select(axes[0], places) if axes else x.detach().clone()

    args, kwargs = tree_map_only(Tensor, resized, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, count)
