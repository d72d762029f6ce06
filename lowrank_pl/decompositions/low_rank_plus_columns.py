"""Some input channels as they are, the others at a low rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from lowrank_pl.decompositions.base import Analysis, Decomposition
from lowrank_pl.decompositions.svd import SVD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import lowered, numbered, of_channels
from lowrank_pl.linalg import Root, decompose, leading_vectors, tail_energies
from lowrank_pl.metric import Metric, columns_of_channels, lowered_roots
from lowrank_pl.structures import Constant, Dense, Layout, Rank, SomeChannels, Structure, Sum

ROUNDS = 20
COUNTS = 64  # of channels, at which errors are known


@final
@dataclass(frozen=True)
class LowRankPlusColumns(Decomposition):
    """`A + B`, A of c whole input channels, B of rank r: C. Yu, Low Rank Approximation (lecture, 2021).

    The rank is (r, c), in each group; either may be 0, but not both. A deploys as the dense layer on its channels. What
    B has there A can hold as well, so that B deploys as an SVD chain on the other channels alone. For layers with more
    than one input channel in a group.
    """

    def unsupported(self, layer: LayerSpec) -> str | None:
        return None if layer.in_channels > layer.groups else "needs more than one input channel in a group"

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (*SVD().full_rank(layer), layer.in_channels // layer.groups)

    def least_rank(self, layer: LayerSpec) -> Rank:
        return 0, 0

    @property
    def spectral(self) -> Decomposition:
        return SVD()

    def completed(self, layer: LayerSpec, ranks: Rank) -> Rank:
        """With as many channels."""
        return (*ranks, min(ranks[0], layer.in_channels // layer.groups))

    def within(self, layer: LayerSpec, weights: float) -> Rank:
        """One part alone where even the smallest of both are too many."""

        def stored(rank: Rank) -> int:
            return self.layout(layer, rank).num_weights

        both, alone = super().within(layer, weights), [(*SVD().within(layer, weights), 0), (0, 1)]
        return both if stored(both) <= weights else min(alone, key=stored)

    def layout(self, layer: LayerSpec, rank: Rank) -> Layout:
        r, c = rank
        if c == 0:
            return SVD().layout(layer, (r,)) if r else Constant(layer)
        whole = layer.with_(in_channels=c * layer.groups)
        columns = SomeChannels(layer, Dense(whole))
        if r == 0:
            return columns
        # at least one: else the cost would fall where A takes the last channel
        others = layer.with_(in_channels=max(layer.in_channels - whole.in_channels, layer.groups))
        return Sum(layer, (columns, SomeChannels(layer, SVD().layout(others, (r,)))))

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> ColumnsApart:
        matrices = _channelwise(weight, layer, metric)
        return ColumnsApart(self, layer, weight, metric, matrices, decompose(matrices.flatten(2)).tails.sum(0))


@final
@dataclass(frozen=True, eq=False)
class ColumnsApart(Analysis):
    """A weight, and, channel by channel, `matrices` `[groups, m, S / groups, w]`, whose Frobenius norm is that of the
    metric where inputs are not correlated across channels; `tails_of_all` are what an SVD of these loses.

    For given channels A and B are exact, in every metric. Which ones is found by turns: the leading directions of the
    others, then the channels that are furthest from these.
    """

    decomposition: LowRankPlusColumns
    layer: LayerSpec
    weight: Tensor
    metric: Metric | None
    matrices: Tensor
    tails_of_all: Tensor
    _known: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def errors(self) -> tuple[Tensor, ...]:
        """Of one entry, while the other is 0."""
        columns = tail_energies(_energies(self.matrices).sort(descending=True).values).sum(0)
        return self._scale * self.tails_of_all, self._scale * columns

    def tails(self, others: Rank = ()) -> Tensor:
        """With the channels of the largest norms, of which others may be better; at some numbers of channels, and
        between two of them at the smaller one."""
        (r,) = others
        _, counts = self.decomposition.values(self.layer, COUNTS)
        for c in set(counts) - self._known.keys():
            self._known[c] = self._scale * self._without(c)
        places = torch.searchsorted(torch.tensor(counts), torch.arange(counts[-1] + 1), right=True) - 1
        return torch.stack([self._known[c][r] for c in counts])[places.to(self.tails_of_all.device)]

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        seen = [self.matrices] if self.metric is None else [self.matrices, _channelwise(self.weight, self.layer, None)]
        found = [self.on_channels(rank, _apart(matrices, *rank)) for matrices in seen]
        return found[0] if self.metric is None else min(found, key=self._error)

    def on_channels(self, rank: Rank, places: Tensor) -> Structure:
        """The nearest one with A on these input channels of each group, `[groups, c]`, ascending.

        With B of rank r on the others, in the metric of what they are given that the channels of A do not tell.
        """
        layer, (r, c) = self.layer, rank
        layout, size = self.decomposition.layout(layer, rank), layer.in_channels // layer.groups
        if c == 0:
            return Structure(layout, rank, SVD().analyze(self.weight, layer, self.metric).factor((r,)).tensors)
        others = _complement(places, size) if c < size else places[:, -1:]
        kept, left = numbered(places, layer), numbered(others, layer)
        columns, rest = (of_channels(self.weight, layer, channels) for channels in (kept, left))
        rest = rest if c < size else torch.zeros_like(rest)
        inner, outer = layer.with_(in_channels=len(kept)), layer.with_(in_channels=len(left))
        told, metric = _told(self.metric, outer, kept, left)
        low: list[Tensor] = []
        if r:
            chain = SVD().analyze(rest, outer, metric).factor((min(r, *SVD().full_rank(outer)),))
            low, rest = _padded(chain, r), rest.double() - chain.reconstruct(torch.float64)
        if told is not None:
            moved = lowered(columns, inner).double() + lowered(rest, outer).double() @ told
            stored = moved.mT if layer.kind == "conv_transpose" else moved
            columns = stored.reshape(inner.stored_shape).to(self.weight.dtype)
        return Structure(layout, rank, (columns, kept, *((*low, left) if r else ())))

    def _without(self, c: int) -> Tensor:
        """What an SVD loses where so many channels are left out."""
        size = self.matrices.shape[2]
        if c in (0, size):
            return self.tails_of_all if c == 0 else torch.zeros_like(self.tails_of_all)
        others = _complement(_largest(_energies(self.matrices), c), size)
        tails = decompose(_gathered(self.matrices, others)).tails.sum(0)
        return torch.nn.functional.pad(tails, (0, len(self.tails_of_all) - len(tails)))

    @cached_property
    def _scale(self) -> float:
        if self.metric is None or not self.tails_of_all[0] > 0:
            return 1.0
        return self.metric.squared_norm(self.weight) / float(self.tails_of_all[0])

    def _error(self, structure: Structure) -> float:
        assert self.metric is not None
        return self.metric.squared_norm(self.weight - structure.reconstruct())


def _channelwise(weight: Tensor, layer: LayerSpec, metric: Metric | None) -> Tensor:
    """`[groups, m, S / groups, w]`, in the weight's type; in a metric as if channels were not correlated."""
    size = layer.in_channels // layer.groups
    blocks: Tensor = lowered(weight, layer).unflatten(2, (size, -1))
    rows, columns = (None, None) if metric is None else lowered_roots(metric)
    if columns is not None:
        own = columns.to(blocks.device).blocks(0, size, blocks.shape[3])
        blocks = own.times(blocks.double().transpose(1, 2)).transpose(1, 2)
    if rows is not None:
        blocks = rows.to(blocks.device).times(blocks.double().flatten(2).mT).mT.unflatten(2, (size, -1))
    return blocks.to(weight.dtype)


def _apart(matrices: Tensor, r: int, c: int) -> Tensor:
    """The c channels of each group that are furthest from the leading r directions of the others, `[groups, c]`: by
    turns, which never gets worse, from the largest ones and from those that are furthest from the directions of all."""
    size, energies = matrices.shape[2], _energies(matrices)
    starts = [energies, _residuals(matrices, matrices.flatten(2), r)] if r else [energies]
    least, best = torch.full_like(energies[:, 0], torch.inf), _largest(energies, c)
    for residuals in starts if 0 < c < size else []:
        kept = _largest(residuals, c)
        for _ in range(ROUNDS if r else 0):
            residuals = _residuals(matrices, _gathered(matrices, _complement(kept, size)), r)
            before, kept = kept, _largest(residuals, c)
            if torch.equal(kept, before):
                break
        error = residuals.gather(1, _complement(kept, size)).sum(1)
        better = error < least
        least, best = error.where(better, least), kept.where(better.unsqueeze(1), best)
    return best


def _residuals(matrices: Tensor, seen: Tensor, r: int) -> Tensor:
    """How far, squared, every channel is from the leading r left directions of `seen`: `[groups, S / groups]`."""
    left = leading_vectors(seen, min(r, seen.shape[1]))
    told = left.mT @ matrices.double().flatten(2)
    return _energies(matrices) - _energies(told.unflatten(2, (matrices.shape[2], -1)))


def _energies(matrices: Tensor) -> Tensor:
    return matrices.double().square().sum((1, 3))


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(count, dim=1).indices.sort(1).values


def _complement(places: Tensor, size: int) -> Tensor:
    """All other places below `size`, ascending."""
    free = torch.ones(len(places), size, dtype=torch.bool, device=places.device).scatter(1, places, False)
    return free.nonzero()[:, 1].view(len(places), -1)


def _gathered(matrices: Tensor, places: Tensor) -> Tensor:
    """`[groups, m, count w]`."""
    groups, m, _, w = matrices.shape
    return matrices.gather(2, places.view(groups, 1, -1, 1).expand(-1, m, -1, w)).flatten(2)


def _told(metric: Metric | None, outer: LayerSpec, kept: Tensor, left: Tensor) -> tuple[Tensor | None, Metric | None]:
    """The best linear guess at the columns of channels `left` from those of `kept`, `[groups, left, kept]`, and the
    metric of what it leaves, for a layer `outer` of the others."""
    if metric is None or metric.inputs is None:
        return None, None if metric is None else Metric(outer, None, metric.outputs)
    second = metric.inputs.to(kept.device).matrix
    k, o = (columns_of_channels(metric.layer, channels) for channels in (kept, left))

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        part = second.gather(1, rows.unsqueeze(2).expand(-1, -1, second.shape[2]))
        return part.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))

    guess = torch.linalg.solve(block(k, k), block(k, o)).mT
    return guess, Metric(outer, Root.of(block(o, o) - guess @ block(k, o), 0.0), metric.outputs)


def _padded(chain: Structure, r: int) -> list[Tensor]:
    """Its factors with zeros up to rank r, which the channels may be too few for."""
    first, second = chain.tensors
    groups = chain.layout.layer.groups
    missing = r - first.shape[0] // groups
    rows = first.unflatten(0, (groups, -1))
    rows = torch.cat([rows, rows.new_zeros(groups, missing, *rows.shape[2:])], dim=1).flatten(0, 1)
    return [rows, torch.cat([second, second.new_zeros(second.shape[0], missing, *second.shape[2:])], dim=1)]
