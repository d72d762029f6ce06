"""Second moments of the loss's gradients at the outputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap
from lowrank_pl.compression import Compression
from lowrank_pl.layers import lowered_outputs
from lowrank_pl.linalg import Root
from lowrank_pl.methods.running import BatchError, seeded
from lowrank_pl.metric import Metric
from lowrank_pl.moments import LONGEST, listening
from lowrank_pl.samples import Samples
from lowrank_pl.surgery import detached_copy
from lowrank_pl.tracing import eager

# Of the mean eigenvalue: outputs that no gradient has reached on the samples still count.
SHRINKAGE = 1e-3


def check_loss(samples: Samples) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of the samples. Raises `ValueError` if there is none."""
    if samples.loss is None:
        raise ValueError(
            "Expected `data` to hold a loss for metric='inputs_and_gradients': give "
            "Samples(loader, loss=lambda model, batch: ...)"
        )
    return samples.loss


def with_gradients(
    metrics: Mapping[str, Metric], model: nn.Module, compressions: Sequence[Compression], samples: Samples
) -> dict[str, Metric]:
    """These metrics with `B = E[g g^T]`, of the gradients of `samples.loss` at the outputs of layers that are modules
    of their own, in a pass of a copy in evaluation mode over the samples.

    They are divided by one number for all layers, so that the scale of the loss has no effect. Raises `ValueError`
    without a loss, and for gradients that are not finite, with the layer's name.
    """
    loss = check_loss(samples)
    layers = {c.name: c.layer for c in compressions}
    heard: set[str] = set()  # not embeddings, whose outputs are no products with their tables
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hear(name: str, each: LinearMap, x: Tensor) -> None:
        heard.add(name)

    def hear_gradient(name: str, each: LinearMap, g: Tensor) -> None:
        if name not in heard:
            return
        generator = torch.Generator().manual_seed(number)
        rows = lowered_outputs(g.detach(), layers[name], samples.places, generator).double()
        if not torch.isfinite(rows.sum()):
            raise BatchError(f"Layer {name!r}, batch {number} of the data: NaN or Inf in the gradients at its outputs")
        product = rows.square().sum(1) if rows.shape[-1] > LONGEST else rows.mT @ rows
        sums[name] = sums[name] + product if name in sums else product
        counts[name] = counts.get(name, 0) + rows.shape[1]

    copy = detached_copy(model).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    device, number = next((p.device for p in copy.parameters()), torch.device("cpu")), 0
    with torch.random.fork_rng(), torch.enable_grad(), eager(), listening(copy, layers, hear, hear_gradient):
        for number, is_held, batch in samples.batches():
            if not is_held:
                with seeded(copy, number):
                    value = loss(copy, samples.moved(batch, device))
                    _check_scalar(value, number)
                    value.backward()
                copy.zero_grad()
    means = {name: total / counts[name] for name, total in sums.items()}
    sizes = [float((m if m.dim() == 2 else m.diagonal(dim1=1, dim2=2)).mean()) for m in means.values()]
    scale = sum(sizes) / max(len(sizes), 1) or 1.0
    roots = {
        name: Root.diagonal(m / scale) if m.dim() == 2 else Root.of(m / scale, SHRINKAGE) for name, m in means.items()
    }
    return {name: replace(metric, outputs=roots.get(name)) for name, metric in metrics.items()}


def _check_scalar(value: object, number: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BatchError(
            f"Batch {number} of the data: expected `loss(model, batch)` to give one number that depends on the model's "
            f"parameters but got {got}{' without a gradient' if isinstance(value, Tensor) else ''}"
        )
