"""What a module was called with, and how many inputs of the network that holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

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
    if isinstance(value, PackedSequence):
        value = pad_packed_sequence(value, batch_first=True)[0]
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
    if not any(isinstance(x, Tensor) and batch in x.shape[:2] for x in held) and not _has_samples(call, batch):
        return None
    return with_inputs(call, batch, min(SAMPLES, batch))


def with_inputs(call: Call, batch: int, count: int) -> Call:
    """A copy of a call on a batch of so many inputs, with `count` of them, repeated as needed.

    A tensor holds inputs along its first axis or, sequence first, its second, if that has the batch's size: along the
    one along which all tensors do, where there is one. Else it is the same for all. A list of as many things is one of
    samples, unless its tensors are batches themselves.
    """
    tensors = [x for x in leaves(call) if isinstance(x, Tensor)]
    common = [axis for axis in (0, 1) if tensors and all(x.shape[axis : axis + 1] == (batch,) for x in tensors)]

    def resized(value: Any) -> Any:
        if isinstance(value, list) and _is_of_samples(value, batch):
            return [_detached(value[i % batch]) for i in range(count)]
        if isinstance(value, PackedSequence):
            padded, lengths = pad_packed_sequence(value, batch_first=True)
            places = torch.arange(count) % len(lengths)
            some = padded.detach()[places.to(padded.device)]
            return pack_padded_sequence(some, lengths[places], batch_first=True, enforce_sorted=False)
        if isinstance(value, Tensor):
            axes = common or [axis for axis, n in enumerate(value.shape[:2]) if n == batch]
            places = torch.arange(count, device=value.device) % batch
            return value.detach().index_select(axes[0], places) if axes else value.detach().clone()
        return value

    whole = lambda v: isinstance(v, PackedSequence) or (isinstance(v, list) and _is_of_samples(v, batch))  # noqa: E731
    args, kwargs = tree_map(resized, (call.args, dict(call.kwargs)), is_leaf=whole)
    return Call(args, kwargs, count)


def _has_samples(call: Call, batch: int) -> bool:
    parts = tree_leaves((call.args, dict(call.kwargs)), is_leaf=lambda value: isinstance(value, list))
    return any(isinstance(part, list) and _is_of_samples(part, batch) for part in parts)


def _is_of_samples(value: list[Any], batch: int) -> bool:
    tensors = [x for x in leaves(value) if isinstance(x, Tensor)]
    return len(value) == batch and bool(tensors) and not all(x.shape[:1] == (batch,) for x in tensors)


def _detached(sample: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().clone(), sample)
