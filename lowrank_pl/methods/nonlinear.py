"""Factors fitted to what comes of a layer's outputs behind batch norm and the activation that follow it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import lowered
from lowrank_pl.structures import Structure, in_type
from lowrank_pl.tracing import Following

MOST = 2**16  # vectors that are kept of a layer
EPOCHS, BATCH, RATE, GAMMA = 12, 512, 1e-2, 0.9


@dataclass
class Rows:
    """What a layer is given in the compressed network, `x` `[groups, n, columns]`, and answers in the dense one, `y`
    `[groups, n, T / groups]`: 65,536 rows at most."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Further rows, while there is room."""
        room = MOST - sum(part.shape[1] for part in self.x)
        if room > 0:
            self.x.append(x[:, :room])
            self.y.append(y[:, :room])


def refine(structure: Structure, layer: LayerSpec, rows: Rows, follow: Following) -> Structure:
    """`min E||f(y) - f(Theta x + b)||^2` over the factors and the bias, f being what follows the layer.

    By RMSProp on rows drawn at random, in float32, from what is given (Osawa's talk of 2017: a rate of 1e-3 and gamma
    0.9). The rate is relative to the size of the factors, and falls to 0 along a cosine. The best of all epochs is
    returned, which is the start where nothing is better.
    """
    x, y = torch.cat(rows.x, dim=1).float(), torch.cat(rows.y, dim=1).float()
    with torch.no_grad():
        wanted = follow(_joined(y))
    assert structure.bias is not None
    tensors = [t.detach().clone() for t in in_type((*structure.tensors, structure.bias), torch.float32)]
    learned = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    rates = [RATE * float(t.detach().square().mean().sqrt().clamp(min=1e-8)) for t in learned]
    optimizer = torch.optim.RMSprop(
        [{"params": [t], "lr": r} for t, r in zip(learned, rates, strict=True)], alpha=GAMMA
    )
    generator = torch.Generator().manual_seed(0)
    count = x.shape[1]
    steps = EPOCHS * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def answer(part: Tensor) -> Tensor:
        *factors, bias = tensors
        theta = lowered(structure.layout.weight(factors), layer)
        return follow(_joined(part @ theta.mT) + bias)

    def loss() -> float:
        with torch.no_grad():
            return float(
                sum((answer(a) - b).square().sum() for a, b in zip(x.split(8192, 1), wanted.split(8192), strict=True))
            )

    best, kept = loss(), [t.detach().clone() for t in tensors]
    for _ in range(EPOCHS):
        for chosen in torch.randperm(count, generator=generator).split(BATCH):
            with torch.enable_grad():
                error = (answer(x[:, chosen]) - wanted[chosen]).square().mean()
                optimizer.zero_grad()
                error.backward()
            optimizer.step()
            schedule.step()
        now = loss()
        if now < best:
            best, kept = now, [t.detach().clone() for t in tensors]
    *factors, bias = in_type(kept, structure.tensors[0].dtype)
    return replace(structure, tensors=tuple(factors), bias=bias)


def _joined(rows: Tensor) -> Tensor:
    """`[groups, n, m]` to `[n, groups m]`."""
    return rows.transpose(0, 1).flatten(1)
