"""Runs of copies that are listened to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowrank_pl.adapters import release_
from lowrank_pl.surgery import detached_copy
from lowrank_pl.tracing.calls import Call, count_inputs
from lowrank_pl.tracing.recorder import Recorder
from lowrank_pl.tracing.trace import Trace


def record(model: nn.Module, example_input: Any, batch_size: int | None = None, training: bool = False) -> Trace:
    """The trace of a forward pass of a copy in evaluation mode, without gradient.

    With `training`, of a model in training mode another pass is heard in the modes that it is in, in which other layers
    may run or have their weights read; one that runs in one of both ways is heard in that. Raises what evaluation
    raised where neither runs, and `ValueError` where it cannot be told how many inputs `example_input` holds.
    """
    batch = count_inputs(example_input, batch_size)
    traces, problems = [], []
    read: set[str] = set()
    for own in (False, True) if training and model.training else (False,):
        try:
            traces.append(_record(model, example_input, batch, own, read))
        except Exception as error:  # batch norm, for instance, refuses a single input in training
            problems.append(error)
    if not traces:
        raise problems[0]
    trace = traces[0]
    for other in traces[1:]:
        trace.calls = other.calls | trace.calls
        trace.samples = other.samples | trace.samples
        trace.networks = other.networks | trace.networks
        trace.odd = other.odd | trace.odd
    trace.hear_reads(read)
    return trace


def _record(model: nn.Module, example_input: Any, batch: int, training: bool, read: set[str]) -> Trace:
    """One pass; adds the layers whose weight others read, whether they run themselves or not."""
    model = detached_copy(model)
    release_(model)
    recorder = Recorder(model, batch)
    try:
        run(model, example_input, training)
    finally:
        recorder.close()
    read |= recorder.read
    return recorder.stop()


def run(model: nn.Module, example_input: Any, training: bool = False) -> Any:
    """The model on its argument, a tuple of arguments or a `Call`, without changing its modes or the random state; in
    evaluation mode, or with `training` in the modes that it is in."""
    modes, call = {module: module.training for module in model.modules()}, Call.of(example_input)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return (model if training else model.eval())(*call.args, **call.kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
