"""Least squares for all factors of a structure in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_pl.metric import Metric
from lowrank_pl.structures.base import Layout, in_type

ITERATIONS = 20  # of conjugate gradients, for each factor


def sweep(layout: Layout, tensors: Sequence[Tensor], target: Tensor, metric: Metric) -> tuple[Tensor, ...]:
    """Every factor once nearer to `target` in a metric, given the others, from the last one to the first; float64.

    The weight is linear in each of them, so that conjugate gradients lower the error at every step, and need only the
    weight and its derivative: for every layout, also where no factor has a closed form.
    """
    found = in_type([tensor.detach() for tensor in tensors], torch.float64)
    error = metric.squared_norm(layout.weight(found) - target)
    for i in reversed([i for i, tensor in enumerate(found) if tensor.is_floating_point()]):
        trial = [*found[:i], nearest(layout, found, i, target.double(), metric), *found[i + 1 :]]
        after = metric.squared_norm(layout.weight(trial) - target)
        if after < error:  # else there was rounding alone left
            found, error = trial, after
    return tuple(found)


def nearest(layout: Layout, tensors: list[Tensor], i: int, target: Tensor, metric: Metric) -> Tensor:
    """Factor i, by conjugate gradients from where it is."""

    def weight(factor: Tensor) -> Tensor:
        return layout.weight([*tensors[:i], factor, *tensors[i + 1 :]])

    def pulled_back(difference: Tensor) -> Tensor:
        """The derivative of `<weight(factor), B difference A>` by the factor."""
        with torch.enable_grad():
            at = tensors[i].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(weight(at), at, metric.times(difference))
        return gradient

    factor = tensors[i]
    residual = pulled_back(target - weight(factor))
    direction, length = residual, residual.square().sum()
    first = length
    for _ in range(min(ITERATIONS, factor.numel())):
        if length <= 1e-24 * first or length == 0:
            break
        answer = pulled_back(weight(direction))
        steepness = (direction * answer).sum()
        if steepness <= 0:  # rounding: nothing depends on it
            break
        factor = factor + length / steepness * direction
        residual = residual - length / steepness * answer
        before, length = length, residual.square().sum()
        direction = residual + length / before * direction
    return factor
