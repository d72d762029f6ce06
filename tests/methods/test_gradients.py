"""Gradients at the outputs of layers: against autograd itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_pl import CostBudget, FixedRank, Samples, Targets, compress, make_plan
from lowrank_pl.methods.collecting import collect
from lowrank_pl.methods.gradients import SHRINKAGE, with_gradients
from lowrank_pl.tracing import record

pytestmark = pytest.mark.filterwarnings("ignore:1 of 3 layers were given fewer vectors")
ALL = Targets(skip_first=False, skip_last=False)


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    batches = [(torch.randn(7, 3, 8, 8), torch.randint(5, (7,))) for _ in range(4)]
    return net, batches


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def test_moments_are_those_of_autograd():
    net, batches = problem()
    samples = Samples(batches, places=None, loss=loss)
    plan = make_plan(net, "svd", FixedRank(2), ALL, record(net, batches[0][0]))
    found = with_gradients(collect(net, plan.compressions, samples).metrics(plan), net, plan.compressions, samples)
    expected = {}
    for batch in batches:
        y, outputs = batch[0], {}
        for i, layer in enumerate(net):
            y = layer(y.clone() if i else y)
            if str(i) in found:
                outputs[str(i)] = y
                y = y.clone()
        for name, g in zip(
            outputs, torch.autograd.grad(F.cross_entropy(y, batch[1]), list(outputs.values())), strict=True
        ):
            expected.setdefault(name, []).append(g.double().flatten(2).mT.flatten(0, 1) if g.dim() == 4 else g.double())
    assert found.keys() == expected.keys() == {"0", "3", "6"}
    moments = {}
    for name, rows in expected.items():
        groups = plan.specs[name].groups
        grouped = torch.cat(rows).unflatten(1, (groups, -1)).transpose(0, 1)
        moments[name] = grouped.mT @ grouped / grouped.shape[1]
    scale = sum(float(m.diagonal(dim1=1, dim2=2).mean()) for m in moments.values()) / 3
    for name, m in moments.items():
        ours = found[name].outputs.matrix
        mean = m.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] / scale
        assert torch.allclose(ours, m / scale + SHRINKAGE * mean * torch.eye(m.shape[1]), rtol=1e-3, atol=1e-5)


def test_nothing_depends_on_the_scale_of_the_loss_and_the_model_is_left_alone():
    net, batches = problem()
    net[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = [
        compress(
            net, "svd", CostBudget("params", 0.6), ALL, metric="inputs_and_gradients",
            data=Samples(batches, loss=lambda model, batch, s=s: s * loss(model, batch)),
        )
        for s in (1.0, 1e6)
    ]  # fmt: skip
    for a, b in zip(small[0].parameters(), small[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()][:2] == [False, True]


def test_what_is_missing_or_not_finite_is_named():
    net, batches = problem()
    with pytest.raises(ValueError, match="Expected `data` to hold a loss"):
        compress(net, "svd", data=batches, metric="inputs_and_gradients")
    broken = Samples(batches, loss=lambda model, batch: loss(model, batch) * float("nan"))
    with pytest.raises(ValueError, match="batch 0 of the data: NaN or Inf in the gradients"):
        compress(net, "svd", FixedRank(1), ALL, data=broken, metric="inputs_and_gradients")
