"""The response behind an activation, for ADMM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lowrank_pl.linalg.admm import Response

STEPS, PART = 3, 8192  # gradient steps for each M; rows at a time


@final
@dataclass(frozen=True, eq=False)
class NonlinearResponse(Response):
    """`E||f(y) - f(M (x - E x) + E y)||^2 / E||f(y) - f(E y)||^2` over rows x `[groups, k, n]` and y `[groups, k, m]`,
    f being what is done to rows `[k, groups m]` next, element by element (batch norm, an activation).

    For M there are a few gradient steps, streamed over the rows, in the metric `2 s^2 Cov(x) / E||...||^2 + t`, s being
    the largest slope of f at the y of each output: never below the curvature of a ReLU, so that no step leads upwards.
    It holds the centred rows, and `E y` as `mean_y`.
    """

    x: Tensor
    mean_y: Tensor
    follow: Callable[[Tensor], Tensor]
    wanted: Tensor
    energy: float
    values: Tensor
    vectors: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, follow: Callable[[Tensor], Tensor]) -> NonlinearResponse:
        """Raises `ValueError` for outputs that do not vary."""
        x, mean = x - x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(x.double().mT @ x.double() / x.shape[1])
        with torch.enable_grad():
            at = y.detach().clone().requires_grad_()
            wanted = follow(_joined(at))
            (slopes,) = torch.autograd.grad(wanted.sum(), at)
        wanted = wanted.detach()
        energy = float((wanted - follow(_joined(mean))).double().square().sum()) / x.shape[1]
        if not energy > 0:
            raise ValueError("Expected outputs that vary behind what follows the layer, but they are all the same")
        return cls(
            x, mean, follow, wanted, energy, values.clamp(min=0), vectors, slopes.double().abs().amax(1).clamp(min=1e-6)
        )

    def value(self, m: Tensor) -> float:
        with torch.no_grad():
            return sum(float(self._error(m, k)) for k in range(0, len(self.wanted), PART))

    def nearest(self, target: Tensor, t: float, m: Tensor) -> Tensor:
        curvature = 2 * self.slopes.square().unsqueeze(2) * self.values.unsqueeze(1) / self.energy + t
        for _ in range(STEPS):
            gradient = t * (m - target)
            for k in range(0, len(self.wanted), PART):
                with torch.enable_grad():
                    at = m.detach().clone().requires_grad_()
                    gradient = gradient + torch.autograd.grad(self._error(at, k), at)[0]
            m = m - (gradient @ self.vectors / curvature) @ self.vectors.mT
        return m

    def _error(self, m: Tensor, start: int) -> Tensor:
        """The share that some of the rows have in the value."""
        rows = self.x[:, start : start + PART]
        answer = self.follow(_joined(rows @ m.to(rows.dtype).mT + self.mean_y))
        error = (answer - self.wanted[start : start + PART]).double().square().sum()
        return error / (self.energy * len(self.wanted))


def _joined(rows: Tensor) -> Tensor:
    """`[groups, k, m]` to `[k, groups m]`."""
    return rows.transpose(0, 1).flatten(1)
