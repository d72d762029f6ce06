"""Non-linear reconstruction: what comes out behind the activation is nearer."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from lowrank_pl import FixedRank, Samples, Targets, compress
from lowrank_pl.decompositions import SVD
from lowrank_pl.layers import spec_of
from lowrank_pl.methods.nonlinear import MOST, Rows, refine


def problem(groups: int = 1) -> tuple[nn.Conv2d, Rows]:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, groups=groups)
    mixed = torch.randn(groups, 4000, 9) @ torch.randn(groups, 9, 54 // groups)
    x = mixed + 0.1 * torch.randn(groups, 4000, 54 // groups)
    y = x @ layer.weight.detach().unflatten(0, (groups, -1)).flatten(2).mT
    return layer, Rows([x], [y + layer.bias.detach().view(groups, 1, -1)])


def error(layer, structure, rows, follow) -> float:
    """Written out."""
    groups = layer.groups
    theta = structure.reconstruct().unflatten(0, (groups, -1)).flatten(2)
    ours = rows.x[0] @ theta.mT + structure.bias.view(groups, 1, -1)
    joined = [part.transpose(0, 1).flatten(1) for part in (ours, rows.y[0])]
    return float((follow(joined[0]) - follow(joined[1])).square().sum())


def test_nearer_behind_the_activation():
    for groups in (1, 2):
        layer, rows = problem(groups)
        spec = spec_of(layer)
        start = SVD().factor(layer.weight, spec, (2,))
        start = replace(start, bias=layer.bias.detach().clone())
        for follow in (F.relu, torch.tanh):
            found = refine(start, spec, rows, follow)
            assert found.layout == start.layout
            assert error(layer, found, rows, follow) < 0.9 * error(layer, start, rows, follow)
        again = refine(start, spec, rows, torch.tanh)
        assert all(map(torch.equal, again.tensors, found.tensors))


def test_where_nothing_is_better_nothing_changes():
    layer, rows = problem()
    spec = spec_of(layer)
    start = replace(SVD().factor(layer.weight, spec, (8,)), bias=layer.bias.detach().clone())
    found = refine(start, spec, rows, F.relu)
    assert error(layer, found, rows, F.relu) <= error(layer, start, rows, F.relu) * (1 + 1e-6)


def test_rows_are_bounded():
    rows = Rows()
    for _ in range(3):
        rows.add(torch.zeros(1, MOST // 2 + 7, 3), torch.zeros(1, MOST // 2 + 7, 2))
    assert sum(part.shape[1] for part in rows.x) == sum(part.shape[1] for part in rows.y) == MOST


def test_in_a_network():
    """Of a network whose layers are followed by an activation, the features behind it are nearer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU()).eval()
    batches = list(torch.randn(12, 20, 3, 9, 9).cumsum(-1))
    samples = Samples(batches, places=None)
    results = {}
    for mode in ("asymmetric", "nonlinear"):
        targets = Targets(skip_first=False, skip_last=False)
        small = compress(net, "svd", FixedRank(4), targets, data=samples, reconstruct=mode)
        with torch.no_grad():
            results[mode] = float(sum((small(x) - net(x)).square().sum() for x in batches[:5]))
    assert results["nonlinear"] < 0.95 * results["asymmetric"]
