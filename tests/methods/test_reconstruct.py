"""Reconstruction against brute force in float64: explicit rows, least squares by NumPy."""

import copy

import nets
import numpy as np
import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, supports
from torch import nn

from lowrank_pl import FixedRank, RankFraction, Samples, Targets, compress, make_plan
from lowrank_pl.compression import Plan
from lowrank_pl.decompositions import DENSE
from lowrank_pl.layers import as_operator, lowered, lowered_inputs, spec_of
from lowrank_pl.methods.collecting import collect
from lowrank_pl.methods.reconstruct import place_, reconstruct
from lowrank_pl.samples import HELD_OUT
from lowrank_pl.structures import Dense
from lowrank_pl.tracing import record

ALL = Targets(skip_first=False, skip_last=False)
SUPPORTED = [(d, name) for d in DECOMPOSITIONS for name in LAYERS if supports(d, make_layer(name)[0])]


class Net(nn.Module):
    """A plain, a grouped and a transposed convolution, a shortcut, a layer that is called twice, in float64."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
            self.up = nn.ConvTranspose2d(8, 6, 3, stride=2)
            self.twice = nn.Linear(6, 6)
            self.head = nn.Linear(6, 5)
            self.norm.running_mean.normal_()
        self.double().eval()

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(x + self.grouped(x))
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


def batches(count=7, size=12):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(count * size, 3, 5, 5, dtype=torch.float64, generator=generator)
    x = x.cumsum(2) @ torch.randn(5, 5, dtype=torch.float64, generator=generator) / 3
    return list((torch.einsum("st,nthw->nshw", mixing, x) + 0.5).split(size))


def rows_of(net, name, data):
    """All rows of one layer, call by call, `[groups, n, columns]`, by a hook of our own."""
    rows, layer = [], net.get_submodule(name)
    hear = lambda module, given: rows.append(lowered_inputs(given[0], spec_of(module), None, torch.Generator()))  # noqa: E731
    handle = layer.register_forward_pre_hook(hear)
    with torch.no_grad():
        for batch in data:
            net(batch)
    handle.remove()
    return torch.cat(rows, 1)


def outputs_of(net, name, rows):
    layer = net.get_submodule(name)
    y = rows @ lowered(layer.weight.detach(), spec_of(layer)).mT
    moves = layer.bias is not None and spec_of(layer).kind != "conv_transpose"
    return y + layer.bias.detach().view(spec_of(layer).groups, 1, -1) if moves else y


def reduced_rank_regression(x, y, rank, transposed):
    """Theta `[m, n]` of that rank, and a bias, with the least `||y - Theta x - bias||^2`, by NumPy; of a transposed
    convolution without a bias."""
    x, y = x.numpy(), y.numpy()
    mean_x, mean_y = (np.zeros(a.shape[1]) if transposed else a.mean(0) for a in (x, y))
    full = np.linalg.lstsq(x - mean_x, y - mean_y, rcond=None)[0].T
    u = np.linalg.svd(((x - mean_x) @ full.T).T, full_matrices=False)[0][:, :rank]
    theta = u @ u.T @ full
    return theta, mean_y - theta @ mean_x


def response(y, ours):
    return float((y - ours).square().sum() / (y - y.mean(1, keepdim=True)).square().sum())


@pytest.fixture(scope="module")
def fitted():
    data = batches()
    net = Net()
    plan = make_plan(net, "svd", FixedRank(2), ALL, record(net, data[0]))
    samples = Samples(data, places=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_pl.methods.reconstruct.DAMPING", 0.0)
        return {
            mode: (net, plan, reconstruct(net, plan, plan.choose_ranks(), samples, mode), data)
            for mode in ("outputs", "asymmetric")
        }


@pytest.mark.parametrize("mode", ["outputs", "asymmetric"])
def test_reduced_rank_regression_layer_by_layer(fitted, mode):
    """In the order of running; from inputs of the dense network, or of the one compressed so far."""
    net, plan, found, data = fitted[mode]
    current = copy.deepcopy(net)
    fit = [batch for i, batch in enumerate(data) if i % HELD_OUT != HELD_OUT - 1]
    held = data[HELD_OUT - 1 :: HELD_OUT]
    assert plan.order == ["conv", "grouped", "up", "twice", "head"]
    for name in plan.order:
        structure, spec = found.structures[name], spec_of(net.get_submodule(name))
        transposed = isinstance(net.get_submodule(name), nn.ConvTranspose2d)
        of = current if mode == "asymmetric" else net
        errors = []
        for part in (fit, held):
            dense_x, x = rows_of(net, name, part), rows_of(of, name, part)
            y = outputs_of(net, name, dense_x)
            theta = lowered(structure.reconstruct(), spec)
            ours = x @ theta.mT + (0 if structure.bias is None else structure.bias.view(spec.groups, 1, -1))
            errors.append(response(y, ours))
        assert (structure.bias is None) == transposed
        assert found.responses[name].fitted == pytest.approx(errors[0], rel=1e-6)
        assert found.responses[name].held_out == pytest.approx(errors[1], rel=1e-6)
        dense_x, x = rows_of(net, name, fit), rows_of(of, name, fit)
        y = outputs_of(net, name, dense_x)
        assert found.responses[name].samples == x.shape[1]
        for g in range(spec.groups):
            theta, bias = reduced_rank_regression(x[g], y[g], 2, transposed)
            best = x[g] @ torch.from_numpy(theta).mT + torch.from_numpy(bias)
            mine = x[g] @ lowered(structure.reconstruct(), spec)[g].mT
            mine = mine if transposed else mine + structure.bias.view(spec.groups, -1)[g]
            least = float((y[g] - best).square().sum())  # what nobody can do better, on these rows
            assert least * (1 - 1e-9) <= float((y[g] - mine).square().sum()) <= least * (1 + 1e-6)
            assert float((mine - best).norm()) <= 1e-3 * float(best.norm())
        if mode == "asymmetric":
            place_(plan_map(current, name), structure)


def plan_map(net, name):
    return {c.name: c.map for c in make_plan(net, "svd", FixedRank(1), ALL).compressions}[name]


def test_asymmetric_is_the_nearer_one_in_its_own_inputs(fitted):
    """What is fitted to what the compressed network gives answers it better than what was fitted to the dense one's."""
    net, plan, found, data = fitted["asymmetric"]
    plain = fitted["outputs"][2]
    current = copy.deepcopy(net)
    fit = [batch for i, batch in enumerate(data) if i % HELD_OUT != HELD_OUT - 1]
    for name in plan.order:
        spec = spec_of(net.get_submodule(name))
        x, y = rows_of(current, name, fit), outputs_of(net, name, rows_of(net, name, fit))
        errors = []
        for structure in (found.structures[name], plain.structures[name]):
            bias = 0 if structure.bias is None else structure.bias.view(spec.groups, 1, -1)
            errors.append(response(y, x @ lowered(structure.reconstruct(), spec).mT + bias))
        assert errors[0] <= errors[1] * (1 + 1e-5)
        place_(plan_map(current, name), found.structures[name])


@pytest.mark.parametrize("mode", ["outputs", "asymmetric"])
@pytest.mark.parametrize(("decomposition", "name"), SUPPORTED, ids=lambda x: str(x).replace(" ", ""))
def test_every_decomposition(decomposition, name, mode):
    """Means stay; no worse than its factors of the weight alone; at (nearly) full rank nothing changes."""
    layer, x = make_layer(name)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(12, *x.shape[1:], dtype=torch.float64, generator=generator) + 1 for _ in range(3)]
    net = nn.Sequential(layer).eval()
    plan = make_plan(net, decomposition, RankFraction(0.4), ALL, record(net, data[0]))
    (c,) = plan.compressions
    choices = plan.choose_ranks()
    found = reconstruct(net, plan, choices, Samples(data, places=None), mode)
    structure = found.structures["0"]
    if isinstance(structure.layout, Dense):
        assert c.settled(choices["0"]) == DENSE
        assert not found.responses
        return
    spec = spec_of(layer)
    rows = rows_of(net, "0", data)
    y = outputs_of(net, "0", rows)
    bias = 0 if structure.bias is None else structure.bias.view(spec.groups, 1, -1)
    ours = rows @ lowered(structure.reconstruct(), spec).mT + bias
    error = response(y, ours)
    assert found.responses["0"].fitted == pytest.approx(error, rel=1e-6, abs=1e-12)
    plain = c.problem().structure(choices["0"]).reconstruct()
    of_weight = rows @ lowered(plain, spec).mT
    if structure.bias is not None:
        scale = float(y.abs().max())
        torch.testing.assert_close(ours.mean(1), y.mean(1), rtol=0, atol=1e-9 * scale)
        of_weight = of_weight - of_weight.mean(1, keepdim=True) + y.mean(1, keepdim=True)
    assert error <= response(y, of_weight) * (1 + 1e-6) + 1e-9
    assert as_operator(structure.reconstruct(), spec).shape[0] == spec.out_channels


@pytest.mark.parametrize("mode", ["outputs", "asymmetric"])
def test_at_full_rank_nothing_changes(mode, monkeypatch):
    net, data = Net(), batches()
    monkeypatch.setattr("lowrank_pl.compression.Compression.settled", lambda self, choice: choice)
    plan: Plan = make_plan(net, "svd", RankFraction(1.0), ALL, record(net, data[0]))
    found = reconstruct(net, plan, plan.choose_ranks(), Samples(data), mode)
    current = copy.deepcopy(net)
    for name, structure in found.structures.items():
        assert not isinstance(structure.layout, Dense)
        place_(plan_map(current, name), structure)
        assert found.responses[name].fitted < 1e-9
    with torch.no_grad():
        expected = net(data[0])
        assert float((current(data[0]) - expected).norm()) <= 1e-5 * float(expected.norm())


def test_few_places_come_near_to_all():
    net, data = Net(), batches(12, 40)
    plan = make_plan(net, "svd", FixedRank(2), ALL, record(net, data[0]))
    few, every = (
        reconstruct(net, plan, plan.choose_ranks(), Samples(data, places=places), "asymmetric") for places in (10, None)
    )
    for name in plan.order:
        assert few.responses[name].held_out == pytest.approx(every.responses[name].held_out, rel=0.3, abs=0.01)


def test_metrics_are_made_once():
    net, data = Net(), batches(2)
    plan = make_plan(net, "svd", FixedRank(2), ALL, record(net, data[0]))
    collected = collect(net, plan.compressions, Samples(data))
    first, second = (collected.metrics(plan, centred=True) for _ in range(2))
    assert all(first[name] is second[name] for name in plan.order)
    assert collected.metrics(plan)["conv"] is not first["conv"]
    out = compress(net, "svd", FixedRank(2), ALL, data=data, reconstruct="outputs")
    assert out(data[0]).shape == (12, 5)


def test_few_samples_do_not_make_it_much_worse_than_outputs(monkeypatch):
    """Of fewer vectors than inputs least squares fits anything, and errors of what is held out grow without bound."""
    net, data = nets.Net(norm=True).eval(), list(nets.images(7)[0].split(4))
    plan = make_plan(net, "svd", RankFraction(0.4), ALL, record(net, data[0]))

    def held_out(mode):
        found = reconstruct(net, plan, plan.choose_ranks(), Samples(data), mode).responses
        return max(each.held_out for each in found.values())

    damped, outputs = held_out("asymmetric"), held_out("outputs")
    monkeypatch.setattr("lowrank_pl.methods.reconstruct.DAMPING", 0.0)
    assert damped < 5 * outputs
    assert damped < 0.3 * held_out("asymmetric")
