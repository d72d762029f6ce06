"""Least squares."""

import torch
from torch import Tensor

from lowrank_pl.linalg.root import CUTOFF


def regress(target: Tensor, features: Tensor) -> Tensor:
    """The X with the least `||X features - target||_F`, the smallest of several: `[..., m, k]` and `[..., f, k]` to
    `[..., m, f]`, in float64."""
    exact = features.double()
    values, vectors = torch.linalg.eigh(exact @ exact.mT)
    inverse = (1 / values).where(values > CUTOFF * values[..., -1:], 0.0)
    solution: Tensor = (target.double() @ exact.mT @ vectors) * inverse.unsqueeze(-2) @ vectors.mT
    return solution
