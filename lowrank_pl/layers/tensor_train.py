"""The deployed form of a tensor train: a linear layer that multiplies by its cores, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers.dense_run import is_traced
from lowrank_pl.layers.rebuilding import RebuildingLayer, Run

MOST_CORES = 16  # as many stages as a layer that is read back may have
CoreShape = tuple[int, int, int, int]  # rank before, outputs, inputs, rank behind


def bonds(sizes: Sequence[int]) -> tuple[int, ...]:
    """The largest ranks between neighbouring cores of a tensor of these sizes: those of its unfoldings."""
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def core_shapes(rows: Sequence[int], columns: Sequence[int], rank: int) -> tuple[CoreShape, ...]:
    """Of the cores of a matrix with `prod(rows)` outputs and `prod(columns)` inputs, every bond at `rank` or at its
    largest one."""
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    ranks = [1, *(min(rank, most) for most in bonds(sizes)), 1]
    return tuple(zip(ranks[:-1], rows, columns, ranks[1:], strict=True))


def core_products(shapes: Sequence[CoreShape]) -> tuple[bool, list[tuple[int, int, int]]]:
    """Whether to begin with the last core; and, in the order of running, the inputs and outputs of each core as a
    matrix, and how many vectors it is applied to for each one that the layer is: in that order of the two which takes
    fewer multiply-adds."""
    rows, columns = [m for _, m, _, _ in shapes], [n for _, _, n, _ in shapes]
    forwards: list[tuple[int, int, int]] = []
    backwards: list[tuple[int, int, int]] = []
    for k, (r, m, n, s) in enumerate(shapes):
        forwards.append((r * n, m * s, math.prod(rows[:k]) * math.prod(columns[k + 1 :])))
        backwards.insert(0, (n * s, r * m, math.prod(columns[:k]) * math.prod(rows[k + 1 :])))
    from_last = total_products(backwards) < total_products(forwards)
    return from_last, backwards if from_last else forwards


def total_products(products: Sequence[tuple[int, int, int]]) -> int:
    """Multiply-adds for each vector that the layer is applied to."""
    return sum(inputs * outputs * count for inputs, outputs, count in products)


def weight_of_cores(cores: Sequence[Tensor]) -> Tensor:
    """`[1, m_1, n_1, r_1]`, ..., `[r_(d-1), m_d, n_d, r_d]` multiplied out: `[m_1 ... m_d, n_1 ... n_d, r_d]`."""
    product = cores[0].squeeze(0)
    for core in cores[1:]:
        product = torch.einsum("abr,rmns->ambns", product, core).flatten(2, 3).flatten(0, 1)
    return product


def strides(shapes: Sequence[CoreShape], from_last: bool) -> list[int]:
    """Of the axis that each core is applied to, in the order of running: the columns, or from the last core on the
    rows, of the cores behind it."""
    axis = 1 if from_last else 2
    found = [math.prod(shape[axis] for shape in shapes[k + 1 :]) for k in range(len(shapes))]
    return found[::-1] if from_last else found


def contract(x: Tensor, cores: list[Tensor], strides: list[int], from_last: bool) -> Tensor:
    """`[..., S]` to `[vectors, ...]`, the outputs of all vectors one after another, in words that TorchScript knows.

    The numbers stand in memory as `[vectors, rows done, rank and columns of the core, columns to do]`, or from the last
    core on as `[vectors, columns to do, columns and rank of the core, rows done]`, so that nothing is ever moved.
    """
    for core, stride in zip(cores[::-1] if from_last else cores, strides):  # noqa: B905 (TorchScript knows no `strict`)
        matrix = (core if from_last else core.permute(1, 3, 0, 2)).flatten(2).flatten(0, 1)
        inputs = matrix.shape[1]
        x = x.reshape(-1, inputs) @ matrix.t() if stride == 1 else matrix @ x.reshape(-1, inputs, stride)
    return x


def multiply(
    x: Tensor, cores: list[Tensor], strides: list[int], from_last: bool, outputs: int, bias: Tensor | None
) -> Tensor:
    """`[..., S]` to `[..., T]` by the cores, in words that TorchScript knows."""
    size = list(x.shape[:-1])
    size.append(outputs)
    y = contract(x, cores, strides, from_last).reshape(size)
    return y if bias is None else y + bias.to(y.dtype)


torch.fx.wrap("multiply")  # which loops and branches, as torch.fx cannot follow


class TTLayer(RebuildingLayer):
    """A linear layer whose weight is a tensor train: `W(i_1..i_d; j_1..j_d) = G_1[i_1, j_1] ... G_d[i_d, j_d]`, the
    TT-layer of Novikov et al. (NIPS 2015).

    Parameters: `cores.k` `[r_(k-1), rows[k], columns[k], r_k]`, whose ranks are `rank` or the largest that there is.
    It multiplies by the first core first, or by the last one, whichever takes fewer multiply-adds; with `run="dense"`
    by the weight that they make, but for `torch.jit.script`, `torch.fx`, `torch.compile` and exported programs, which
    would rebuild that at every call.
    """

    def __init__(
        self, spec: LayerSpec, rows: Sequence[int], columns: Sequence[int], rank: int, bias: bool, run: Run
    ) -> None:
        super().__init__(spec, bias, run)
        self.rows, self.columns, self.rank = tuple(rows), tuple(columns), rank
        shapes = core_shapes(rows, columns, rank)
        self._from_last, _ = core_products(shapes)
        self._strides, self._outputs = strides(shapes, self._from_last), spec.out_channels
        self.cores = nn.ParameterList(torch.empty(shape) for shape in shapes)
        paths = math.prod(s for _, _, _, s in shapes)  # each entry of the weight is a sum of so many products
        for core in self.cores:
            nn.init.normal_(core, std=(paths * spec.in_channels) ** (-0.5 / len(shapes)))

    def factors(self) -> list[Tensor]:
        return list(self.cores)

    def dense_weight(self) -> Tensor:
        return weight_of_cores(self.factors()).squeeze(2)

    def multiply_vectors(self, x: Tensor) -> Tensor:
        return multiply(x, self.factors(), self._strides, self._from_last, self._outputs, None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._by_cores(x)
        else:  # which TorchScript leaves out
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        by_cores = self.run == "factors" or isinstance(x, torch.fx.Proxy) or is_traced()
        return self._by_cores(x) if by_cores else F.linear(x, self._weight(), self.bias)

    def _by_cores(self, x: Tensor) -> Tensor:
        cores = [core for core in self.cores]
        return multiply(x, cores, self._strides, self._from_last, self._outputs, self.bias)

    def extra_repr(self) -> str:
        shape = " ".join(f"{m}x{n}" for m, n in zip(self.rows, self.columns, strict=True))
        return f"{self.spec.out_channels} x {self.spec.in_channels}: {shape}, rank={self.rank}, run={self.run!r}"
