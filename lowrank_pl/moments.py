"""Second moments of what layers are given, summed up while a network runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import lowered_inputs
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric, columns_of

LONGEST = 8192  # inputs; of longer ones a factor with so many rows is kept at most, in place of the square matrix
ROWS = 4096
SMALL = 256  # columns: halves of fewer are multiplied no faster
Hear = Callable[[str, LinearMap, Tensor], None]


@final
@dataclass
class Moments:
    """Sums over the rows x `[groups, n, columns]` that the matrices of a layer are applied to, and over rows y
    `[groups, n, T / groups]` that belong to them, if there are any: of as many numbers however many rows there are.

    `second` is that of `x x^T`, `cross` of `y x^T`, `first` and `first_y` of the rows, `squares` of `||y||^2`; float64.
    Where rows are longer than 8,192 `second` is a matrix `[groups, k, columns]` with `R^T R` in its place, and `floor`
    what is left out on the average.
    """

    layer: LayerSpec
    count: float = 0.0
    first: Tensor | None = None
    second: Tensor | None = None
    cross: Tensor | None = None
    first_y: Tensor | None = None
    squares: float = 0.0
    floor: Tensor | None = None

    @property
    def is_long(self) -> bool:
        return columns_of(self.layer) > LONGEST

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Further rows. Raises `ValueError` for numbers that are not finite."""
        x = _wide(x)
        first = x.sum(1)
        if not torch.isfinite(first).all():
            raise ValueError("NaN or Inf in its inputs")
        self.count += x.shape[1]
        self.first = _sum(self.first, first)
        if self.is_long:
            for part in x.split(ROWS, dim=1):
                self.second = self._shortened(part)
        else:
            self.second = _sum(self.second, _gram(x))
        if y is not None:
            y = _wide(y)
            self.cross, self.first_y = _sum(self.cross, y.mT @ x), _sum(self.first_y, y.sum(1))
            self.squares += float(y.square().sum())

    def fade(self, share: float) -> None:
        """Keep this share of all sums: with rows added after it, those of before count less and less."""
        self.count, self.squares = self.count * share, self.squares * share
        for name in ("first", "cross", "first_y", "floor"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value * share)
        if self.second is not None:
            self.second = self.second * (share**0.5 if self.is_long else share)

    @property
    def mean(self) -> Tensor:
        """`[groups, columns]`."""
        assert self.first is not None
        return self.first / self.count

    @property
    def mean_y(self) -> Tensor:
        """`[groups, T / groups]`."""
        assert self.first_y is not None
        return self.first_y / self.count

    def covariance(self) -> Tensor:
        """`Cov(x)`, `[groups, columns, columns]`."""
        assert self.second is not None
        return self.second / self.count - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    def of_pairs(self, centred: bool) -> tuple[Tensor, Tensor]:
        """`E[y x^T]` and `E[x x^T]`, or both covariances."""
        assert self.cross is not None
        assert self.second is not None
        if not centred:
            return self.cross / self.count, self.second / self.count
        return self.cross / self.count - self.mean_y.unsqueeze(2) * self.mean.unsqueeze(1), self.covariance()

    def energy(self, matrices: Tensor) -> float:
        """`E||M x||^2` of matrices `[groups, m, columns]`."""
        assert self.second is not None
        if self.is_long:
            left_out = 0.0 if self.floor is None else float((matrices.square().sum((1, 2)) * self.floor).sum())
            return (float((matrices @ self.second.mT).square().sum()) + left_out) / self.count
        return float((matrices * (matrices @ self.second)).sum()) / self.count

    def through(self, matrices: Tensor) -> Tensor:
        """`M E[x]`, `[groups, m]`."""
        return (matrices @ self.mean.unsqueeze(2)).squeeze(2)

    def root(self, centred: bool = False) -> Root:
        """Of `E[x x^T]`, or of the covariance."""
        assert self.second is not None
        if self.is_long:
            floor = torch.zeros_like(self.first[:, 0]) if self.floor is None else self.floor  # type: ignore[index]
            return Root.from_samples(self.second / self.count**0.5, floor / self.count)
        return Root.of(self.covariance() if centred else self.second / self.count)

    def metric(self, centred: bool = False, outputs: Root | None = None) -> Metric:
        """The metric of these inputs."""
        return Metric(self.layer, self.root(centred), outputs)

    def _shortened(self, x: Tensor) -> Tensor:
        """Rows with nearly the same `R^T R`: at most `2 * ROWS`, then the `ROWS` longest directions of these."""
        rows = x if self.second is None else torch.cat([self.second, x], dim=1)
        if rows.shape[1] <= 2 * ROWS:
            return rows
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        left_out = values[..., :-ROWS].sum(-1) / rows.shape[-1]
        self.floor = _sum(self.floor, left_out)
        kept: Tensor = vectors[..., -ROWS:].mT @ rows
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {name: value for name, value in vars(self).items() if name != "layer"}

    @classmethod
    def from_state_dict(cls, layer: LayerSpec, state: Mapping[str, Any]) -> Moments:
        """The inverse of `state_dict`."""
        return cls(layer, **state)


@contextmanager
def listening(
    model: nn.Module, names: Collection[str], hear: Hear, hear_gradient: Hear | None = None
) -> Iterator[None]:
    """For as long as it lasts, what these linear maps are applied to is heard, call by call, before they run; of those
    that are modules of their own also the gradients at their outputs, while a backward pass runs.

    Nothing is heard where nobody knows what a map is applied to, nor of calls that an activation checkpoint repeats.
    """
    owners: dict[nn.Module, dict[str, LinearMap]] = {}
    for name, each in find_maps(model).items():
        if name in names:
            owners.setdefault(each.module, {})[each.key] = each
    with ExitStack() as stack:
        for owner, maps in owners.items():
            before = partial(_hear_inputs, maps, hear)
            stack.callback(owner.register_forward_pre_hook(before, with_kwargs=True).remove)
            if hear_gradient is not None and "" in maps:
                after = partial(_await_gradient, maps[""], hear_gradient)
                stack.callback(owner.register_forward_hook(after).remove)
        yield


def _hear_inputs(
    maps: Mapping[str, LinearMap], hear: Hear, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if torch._C._current_graph_task_id() != -1:  # in a backward pass
        return
    adapter = next(iter(maps.values())).adapter
    with torch.no_grad(), torch.random.fork_rng():  # it may run the module again, with its dropout
        found = adapter.applied_to(module, maps, args, kwargs) or {}
    for key, x in found.items():
        if key in maps and x.numel():
            hear(maps[key].name, maps[key], x)


def _await_gradient(each: LinearMap, hear: Hear, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad and output.numel():
        output.register_hook(partial(hear, each.name, each))


def warn_of_few(moments: Mapping[str, Moments]) -> None:
    """Warn where there were fewer rows than inputs: second moments are singular then."""
    few = {name: m for name, m in moments.items() if m.count < columns_of(m.layer)}
    if few:
        name, m = max(few.items(), key=lambda item: columns_of(item[1].layer) / max(item[1].count, 1))
        warnings.warn(
            f"{len(few)} of {len(moments)} layers were given fewer vectors than they have inputs (layer {name!r}: "
            f"{m.count:,.0f} of {columns_of(m.layer):,}): what was never seen counts as if it never came. Give more "
            "data, or more `places` of each input",
            stacklevel=3,
        )


def draw(x: Tensor, layer: LayerSpec, places: int | None, seed: int) -> Tensor:
    """`lowered_inputs` at places that the seed says, in float32 at least."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return lowered_inputs(x.detach(), layer, places, torch.Generator().manual_seed(seed))


def _wide(x: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return (x.cpu() if x.device.type == "mps" else x).detach().double()


def _gram(x: Tensor) -> Tensor:
    """`x^T x` without most of what is there twice."""
    size = x.shape[-1]
    if size < SMALL or x.is_cuda:
        return x.mT @ x
    first, second = x.split((size // 2, size - size // 2), dim=-1)
    corner = first.mT @ second
    rows = (torch.cat([_gram(first), corner], -1), torch.cat([corner.mT, _gram(second)], -1))
    return torch.cat(rows, -2)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
