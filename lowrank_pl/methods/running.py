"""Running a copy of a network over samples, so that every pass is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowrank_pl.tracing import eager, slow_paths


class Over(BaseException):
    """Ends a run early, past whatever `except Exception` there is in it."""


class BatchError(ValueError):
    """It names the batch that something is wrong with."""


@contextmanager
def named(name: str, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise BatchError(f"Layer {name!r}, batch {number} of the data: {error}") from error


@contextmanager
def seeded(model: nn.Module, number: int) -> Iterator[None]:
    """One run, on a batch of that number, of which all draw the same random numbers."""
    torch.default_generator.manual_seed(number)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device.index].manual_seed(number)
    try:
        yield
    except BatchError:
        raise
    except Exception as error:
        raise ValueError(
            f"Batch {number} of the data: the model does not run on it ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, eagerly and without gradients; then as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), eager(), slow_paths(), torch.random.fork_rng(_cuda_devices(model)):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cuda_devices(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type == "cuda"}
