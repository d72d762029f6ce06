"""Random factors to train from scratch: Tai, Xiao, Zhang, Wang & E (ICLR 2016), section 3, in any structure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import Choice
from lowrank_pl.linalg import squared_norm
from lowrank_pl.ranks import RankRule
from lowrank_pl.structures import Dense, Layout, Structure


def check_rules(rules: Mapping[str, RankRule]) -> None:
    """Raise `ValueError` for rules that look at weights, which say nothing before training."""
    for rule in rules.values():
        if not rule.sees_shapes_alone:
            raise ValueError(
                "Expected a `rank` that follows from shapes, such as CompressionRatio, RankFraction or FixedRank, "
                f"where factors are random, but got {type(rule).__name__}, which looks at weights: train the dense "
                "network first for that"
            )


def random_structures(plan: Plan, choices: Mapping[str, Choice], normed: bool = False) -> dict[str, Structure]:
    """Every target's factors, drawn from PyTorch's generator such that its weight has the variance that the dense one
    has been initialized with.

    With `normed`, batch norms shall stand between the factors of convolutions (see `factor_variances`). Layers that
    start at zero stay dense, since none of several factors that are all zero would learn. Raises `ValueError` that
    names the layer for weights that are not finite, and for structures that are more than products of factors.
    """
    variances = {c.name: _variance(c) for c in plan.compressions}
    plan.leave_dense([name for name, each in variances.items() if each == 0], "its weight starts at zero")
    structures = {}
    for c in plan.compressions:
        choice = c.settled(choices[c.name])
        layout = choice.layout(c.layer)
        if isinstance(layout, Dense):
            structures[c.name] = Structure(layout, choice.rank, (c.read(),))
            continue
        if layout.products() is None:
            raise ValueError(
                f"Layer {c.name!r}: {layout.describe()} is not a product of factors, which alone can be random: choose "
                "another `method`"
            )
        like, each = c.read(), factor_variances(layout, variances[c.name], normed and bool(c.layer.kernel))
        drawn = [torch.randn(shape) * math.sqrt(v) for shape, v in zip(layout.shapes(), each, strict=True)]
        structures[c.name] = Structure(layout, choice.rank, tuple(x.to(like) for x in drawn))
    return structures


def factor_variances(layout: Layout, variance: float, normed: bool = False) -> list[float]:
    """The variance of each factor's values, independent and around 0, for that of every value of the weight to be
    `variance`: forward and backward, the layer then changes the variance of what passes it as the dense one does.

    A value of the weight is a sum over `paths` of products with one value `v_i` of each factor, so that
    `variance = paths * v_1 * v_2 ...`. What is left open is shared out such that `v_i` is in proportion to
    `1 / sqrt(n_i)`, `n_i` values in factor i: the squared gradient of a value is `paths_through / v_i` times what is
    the same for all factors, and `n_i paths_through` is the number of all paths, so that an optimizer's relative steps,
    `gradient^2 / v_i`, are equal. For two factors `U [T, r]`, `V [r, S]` this is halfway between signals of equal
    variance before and behind each factor (`S v_V = r v_U`) and gradients of equal variance (`r v_V = T v_U`).

    With `normed`, what stands between the factors of a chain makes signals one in variance: there every factor but the
    last keeps the variance (`v_i` times its number of inputs is 1), so that the norms start as the identity.
    """
    shapes, products = layout.shapes(), layout.products()
    assert products is not None
    found = [math.prod(shape) ** -0.5 for shape in shapes]
    if normed and len(products) == 1:
        found[:-1] = [1 / math.prod(shape[1:]) for shape in shapes[:-1]]
    for members in products:
        own = [found[i] if i in members else 0.0 for i in range(len(shapes))]
        each = [torch.full(shape, v, dtype=torch.float64) for shape, v in zip(shapes, own, strict=True)]
        made = float(layout.weight(each).max())  # of those values of the weight that these factors make
        if normed and len(products) == 1:
            found[-1] *= variance / made
            continue
        for i in members:
            found[i] *= (variance / made) ** (1 / len(members))
    return found


def _variance(c: Compression) -> float:
    """Of the values of a weight, around 0."""
    weight = c.read()
    found = squared_norm(weight) / weight.numel()
    if not math.isfinite(found):
        raise ValueError(f"Layer {c.name!r}: expected finite weights but found NaN or Inf")
    return found
