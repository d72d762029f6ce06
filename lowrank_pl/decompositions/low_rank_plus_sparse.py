"""Low rank + sparse: smooth parts in a subspace, and what stands out of it one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lowrank_pl.checks import check_among, check_number
from lowrank_pl.decompositions.base import Analysis, Decomposition
from lowrank_pl.decompositions.svd import SVD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import SparseRun, lowered, packed, raised
from lowrank_pl.linalg import Alternation, Quadratic, godec, grebdec, prune
from lowrank_pl.metric import Metric, lowered_roots
from lowrank_pl.names import resolve
from lowrank_pl.structures import Constant, Layout, Rank, Sparse, Structure, Sum, in_type, sweep

# Where rules weigh errors against costs, at most so many ranks of the low-rank part are tried, and numbers of nonzeros
LOW_RANKS = 16
SAMPLE = 2**18  # entries that errors of larger weights are estimated from


@final
@dataclass(frozen=True)
class LowRankPlusSparse(Decomposition):
    """`L + S`, L of low rank and S with few nonzeros, two branches side by side: Yu, Liu, Wang & Tao (CVPR 2017).

    The rank is that of `low_rank`, any other structure (or its name), and the number of nonzeros. All zeros for the
    former is pruning, 0 nonzeros are `low_rank` alone; no rank is 0 throughout. Rules that grow entries together give
    the sparse part `share` of the stored values, those that compare errors with costs weigh both against each other on
    a grid. Nearest in Frobenius norm by GoDec, in a metric by GreBdec (see `lowrank_pl.linalg`), which end in a local
    optimum. A value is charged as one weight and one product at each position. `run` says how the extracted sparse
    branch computes: `"dense"`, masked, with the dense layer's products, or `"csr"`, which skips zeros; None: extraction
    measures both and takes the faster.
    """

    low_rank: str | Decomposition = field(default_factory=SVD)
    share: float = 0.5
    run: SparseRun | None = None

    def __post_init__(self) -> None:
        check_among("run", self.run, ("dense", "csr", None))
        check_number("share", self.share, lambda x: 0 <= x <= 1, "a share in [0, 1]")
        low_rank = resolve(self.low_rank, Decomposition, "low_rank")["*"]  # type: ignore[type-abstract]
        if isinstance(low_rank, LowRankPlusSparse):
            raise ValueError("Expected argument `low_rank` to be another structure than low rank + sparse")
        object.__setattr__(self, "low_rank", low_rank)

    @property
    def spectral(self) -> Decomposition:
        assert isinstance(self.low_rank, Decomposition)
        return self.low_rank

    def by_stages(self) -> LowRankPlusSparse:
        return replace(self, low_rank=self.spectral.by_stages(), run=self.run or "csr")

    def unsupported(self, layer: LayerSpec) -> str | None:
        return self.spectral.unsupported(layer)

    def full_rank(self, layer: LayerSpec) -> Rank:
        return (*self.spectral.full_rank(layer), layer.num_weights)

    def least_rank(self, layer: LayerSpec) -> Rank:
        return (0,) * len(self.full_rank(layer))

    def is_rank(self, layer: LayerSpec, rank: Rank) -> bool:
        low, full = rank[:-1], self.full_rank(layer)
        if len(rank) != len(full) or not 0 <= rank[-1] <= full[-1]:
            return False
        return self.spectral.is_rank(layer, low) or (not any(low) and rank[-1] > 0)

    def layout(self, layer: LayerSpec, rank: Rank) -> Layout:
        parts: list[Layout] = [self.spectral.layout(layer, rank[:-1])] if all(rank[:-1]) else []
        parts += [Sparse(layer, rank[-1], self.run)] if rank[-1] else []
        return Sum(layer, tuple(parts)) if len(parts) > 1 else parts[0] if parts else Constant(layer)

    def completed(self, layer: LayerSpec, ranks: Rank) -> Rank:
        stored = self.spectral.layout(layer, ranks).num_weights
        if self.share == 1:
            return (*(0 for _ in ranks), min(stored, layer.num_weights))
        return (*ranks, min(round(stored * self.share / (1 - self.share)), layer.num_weights))

    def at_fraction(self, layer: LayerSpec, fraction: float) -> Rank:
        """With so many of the layer's weights; all of both parts at 1."""
        return self.full_rank(layer) if fraction == 1 else self.within(layer, max(fraction * layer.num_weights, 1))

    def within(self, layer: LayerSpec, weights: float) -> Rank:
        """The low-rank part gets what `share` leaves, as far as its ranks use it up, and the sparse part the rest."""
        low = self.spectral.within(layer, (1 - self.share) * weights)
        stored = self.spectral.layout(layer, low).num_weights
        if stored > (1 - self.share) * weights:
            low, stored = (0,) * len(low), 0
        rest = int(weights) - stored if self.share else 0
        rank = (*low, min(rest, layer.num_weights))
        return rank if any(rank) else (*low, 1) if self.share else (*self.spectral.within(layer, weights), 0)

    def values(self, layer: LayerSpec, most: int) -> tuple[list[int], ...]:
        """Denser where there are few."""
        full = self.full_rank(layer)
        counts = [round(LOW_RANKS ** (1 / len(full[:-1])))] * len(full[:-1]) + [most]
        return tuple(
            sorted({round(entry * (i / min(count, entry)) ** 2) for i in range(min(count, entry) + 1)})
            for entry, count in zip(full, counts, strict=True)
        )

    def analyze(self, weight: Tensor, layer: LayerSpec, metric: Metric | None = None) -> Analysis:
        return LowRankRest(self, layer, weight, metric, self.spectral.analyze(weight, layer, metric))


@final
@dataclass(frozen=True, eq=False)
class LowRankRest(Analysis):
    """A weight with the analysis of its low-rank part alone, and what is left beside it.

    The error at a rank is at most what is left when the low-rank part is found first and the largest entries of the
    rest are kept then, of which `tails` knows: exactly so in Frobenius norm for weights of up to 262,144 entries, from
    so many of them for larger ones, and as if inputs were not correlated in a metric.
    """

    decomposition: LowRankPlusSparse
    layer: LayerSpec
    weight: Tensor
    metric: Metric | None
    low: Analysis
    _shares: dict[Rank, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def errors(self) -> tuple[Tensor, ...]:
        return (*self.low.errors, self.tails((0,) * len(self.low.errors)))

    def tails(self, others: Rank = ()) -> Tensor:
        if others not in self._shares:
            self._shares[others] = self._share_of_rest(others)
        error, shares = self._shares[others]
        places = np.arange(self.layer.num_weights + 1) * ((len(shares) - 1) / self.layer.num_weights)
        found = shares if len(shares) == len(places) else np.interp(places, np.arange(len(shares)), shares)
        return torch.from_numpy(error * found).to(self.weight.device)

    def _share_of_rest(self, low: Rank) -> tuple[float, Any]:
        """What the low-rank part leaves, and which share of that is left beside 0, 1, ... of its largest entries."""
        error, rest = float(self.low.errors[0][0]), self.weight.double()
        if all(low):
            projected = self.low.factor(low).reconstruct(torch.float64)
            rest = rest - projected
            error = float(self.low.errors[0][low[0]]) if len(low) == 1 else self._norm(rest)
        elif any(low):  # no rank
            return error, np.ones(2)
        squares = (lowered(rest, self.layer).square() * self._form.diagonal).flatten()
        step = -(-len(squares) // SAMPLE)
        kept = squares[::step].sort(descending=True).values
        left = torch.cat([kept.flip(0).cumsum(0).flip(0), kept.new_zeros(1)])
        return error, (left / left[0]).cpu().numpy() if left[0] > 0 else np.zeros(len(left))

    def factor(self, rank: Rank) -> Structure:
        self.decomposition.check_rank(self.layer, rank)
        *others, count = rank
        if not count:
            return replace(self.low.factor(tuple(others)), rank=rank)
        low = tuple(others) if any(others) else None
        found = self._structure(self._nearest(low, count), low)
        if self.metric is None:
            return found
        plain = self._plain(low, count)
        found = min(found, plain, key=lambda each: self._norm(self.weight.double() - each.reconstruct(torch.float64)))
        tensors = found.tensors
        for _ in range(self.metric.sweeps):
            tensors = tuple(sweep(found.layout, tensors, self.weight, self.metric))
        return found.with_tensors(in_type(tensors, self.weight.dtype))

    @cached_property
    def _form(self) -> Quadratic:
        roots = (None, None) if self.metric is None else lowered_roots(self.metric)
        return Quadratic(*(None if root is None else root.to(self.weight.device) for root in roots))

    @property
    def _target(self) -> Tensor:
        return lowered(self.weight.double(), self.layer)

    def _nearest(self, low: Rank | None, count: int, form: Quadratic | None = None) -> Alternation:
        """Where the search ends; in another form than that of the metric, if that is given."""
        form = self._form if form is None else form
        if low is None:
            return prune(self._target, form, count)
        if isinstance(self.decomposition.spectral, SVD) and form.right is not None:
            return grebdec(self._target, form, count, *low)
        metric = self.metric if form is self._form else None
        return godec(self._target, form, count, self._projection(low, metric))

    def _plain(self, low: Rank | None, count: int) -> Structure:
        """Values where they stand nearest in Frobenius norm, all of it refitted in the metric."""
        assert self.metric is not None
        form = Quadratic()
        state = self._nearest(low, count, form)
        rest = torch.zeros_like(state.sparse)
        if low is not None:
            rest = self._projection(low, self.metric)(self._target - state.sparse)
        return self._structure(Alternation.at(self._target, self._form, rest, state.sparse, state.mask), low)

    def _projection(self, rank: Rank, metric: Metric | None) -> Callable[[Tensor], Tensor]:
        """Of lowered weights, onto low rank."""
        return lambda x: lowered(self._low_of(x, rank, metric).reconstruct(torch.float64), self.layer)

    def _low_of(self, matrices: Tensor, rank: Rank, metric: Metric | None) -> Structure:
        # as many digits as the weight has, half of them apart: the fast route is exact enough
        exact = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        weight = raised(matrices, self.layer).to(exact)
        return self.decomposition.spectral.analyze(weight, self.layer, metric).factor(rank)

    def _structure(self, state: Alternation, low: Rank | None) -> Structure:
        """What has been found, L once more nearest to what S leaves."""
        sparse, mask = (raised(x, self.layer) for x in (state.sparse, state.mask))
        places = mask.flatten().nonzero().flatten()
        tensors: list[Tensor] = [sparse.flatten()[places], packed(places, self.layer)]
        rank = (*(low or (0,) * len(self.low.errors)), len(places))
        if low is not None:
            last = self._low_of(state.target - state.sparse, low, self.metric)
            error = lowered(last.reconstruct(torch.float64), self.layer) + state.sparse - state.target
            if state.form.norm(error) > state.error * (1 + 1e-6):  # as where a projection is no optimum
                last = self._low_of(state.low, low, self.metric)
            tensors = [*last.tensors, *tensors]
        layout = self.decomposition.layout(self.layer, rank)
        return Structure(layout, rank, tuple(in_type(tensors, self.weight.dtype)))

    def _norm(self, weight: Tensor) -> float:
        return float(weight.square().sum()) if self.metric is None else self.metric.squared_norm(weight)
