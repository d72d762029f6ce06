"""How far layers' outputs are from those of the dense network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank_pl.compression import Compression, Plan
from lowrank_pl.layers import lowered
from lowrank_pl.methods.collecting import Collected, can_move_bias
from lowrank_pl.moments import Moments
from lowrank_pl.structures import Dense, Structure

ROUNDING = 1e-12  # of outputs' squares: what varies less does not vary


@dataclass(frozen=True)
class Response:
    """How far a layer's outputs are from the dense network's, `E||y' - y||^2 / E||y - mean(y)||^2`: on the samples, and
    on those held back (None without any). `samples` are the vectors that it was fitted to."""

    samples: int
    fitted: float
    held_out: float | None


@dataclass(frozen=True)
class Fitted:
    """Factors by layer, and what their outputs are like."""

    structures: dict[str, Structure]
    responses: dict[str, Response]


def with_responses(plan: Plan, structures: dict[str, Structure], collected: Collected) -> Fitted:
    """What the outputs of these structures are like."""
    answers = {
        c.name: response_of(c, structures[c.name], collected.fitted[c.name], collected.held.get(c.name))
        for c in plan.compressions
        if c.name in collected.fitted and not isinstance(structures[c.name].layout, Dense)
    }
    return Fitted(structures, answers)


def response_of(c: Compression, structure: Structure, m: Moments, held: Moments | None) -> Response:
    held_out = None if held is None else _error(c, structure, held)
    return Response(round(m.count), _error(c, structure, m), held_out)


def _error(c: Compression, structure: Structure, m: Moments) -> float:
    """Of the outputs, as a share of their variance; of long inputs as a share of their squared norm."""
    assert m.second is not None
    theta, own = (lowered(w, c.layer).double() for w in (structure.reconstruct(), c.read()))
    if m.cross is None:
        difference, shift = own - theta, torch.zeros_like(own[:, :, 0])
        if structure.bias is not None:
            old = 0.0 if c.map.bias is None else c.map.bias.detach().double()
            shift = (old - structure.bias.double()).view_as(shift)
        error = m.energy(difference) + float((shift.square() + 2 * shift * m.through(difference)).sum())
        energy = m.energy(own)
        return _share(error, energy - (0.0 if m.is_long else float(m.through(own).square().sum())), energy)
    error = m.energy(theta) + (m.squares - 2 * float((theta * m.cross).sum())) / m.count
    if can_move_bias(c.map):
        bias = structure.bias if structure.bias is not None else c.map.bias
        if bias is not None:
            bias = bias.detach().double().view_as(m.mean_y)
            error += float((bias.square() + 2 * bias * (m.through(theta) - m.mean_y)).sum())
    return _share(error, m.squares / m.count - float(m.mean_y.square().sum()), m.squares / m.count)


def _share(error: float, variance: float, energy: float) -> float:
    """Of outputs that do not vary, but for rounding, as a share of that."""
    least = max(energy * ROUNDING, torch.finfo(torch.float64).tiny)
    return max(error, 0.0) / max(variance, least)
