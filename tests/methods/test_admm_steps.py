"""Steps of ADMM on a network against the lecture's formulas, written out, and autograd."""

import numpy as np
import pytest
import torch
from nets import Net
from torch import nn

from lowrank_pl.compression import write_weights_
from lowrank_pl.decompositions import DENSE, ZERO, LowRankPlusColumns
from lowrank_pl.methods import Splits, add_split_gradients_, choices_of, deployed, split_step
from lowrank_pl.planning import make_plan
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import record

ALL = Targets(skip_first=False, skip_last=False)


class Layers(nn.Module):
    """Of every kind: matrices, kernels, groups, transposed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.up(self.grouped(self.conv(x))).mean((2, 3)))


def make(net=None, seed=0):
    torch.manual_seed(seed)
    net = (net or Layers()).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return net, make_plan(net, LowRankPlusColumns(), None, ALL, record(net, x), training=True)


def move(plan, seed, size=0.1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for c in plan.compressions:
            c.parameters[0].add_(size * torch.randn_like(c.read()))


def matrices(weight, name):
    """`[groups, rows, input channels, places]`, by what PyTorch's documentation says of the shapes."""
    w = weight.detach().numpy()
    if name == "up":  # [in, out, 2, 2]
        return np.moveaxis(w, 0, 2).reshape(1, -1, 12, 1) if w.ndim == 3 else w.reshape(12, -1).T[None, :, :, None]
    if name == "grouped":
        return w.reshape(2, 6, 4, 9)
    return w.reshape(w.shape[0], w.shape[1], -1)[None]


def test_the_steps_are_those_of_the_lecture():
    _, plan = make()
    l1, l2, t, growth = 0.05, 0.08, 0.2, 1.3
    state, own = None, {}
    for j in range(4):
        state, done = split_step(plan, state, l1, l2, t, growth, rounds=1)
        penalty, primal = 0.0, []
        for c in plan.compressions:
            w = matrices(c.read(), c.name)
            g, m, s, k = w.shape
            flat = w.reshape(g, m, s * k)
            if j == 0:
                energy = (w**2).sum()
                first = energy / np.sqrt((w**2).sum((1, 3))).sum(), energy / sum(np.linalg.norm(x, "nuc") for x in flat)
                own[c.name] = [np.zeros_like(flat), np.zeros_like(flat), np.zeros_like(flat), t, first]
            a, b, multipliers, now, (unit1, unit2) = own[c.name]
            if j > 0:
                gap = a + b - flat
                primal.append(np.linalg.norm(gap) / max(np.linalg.norm(a + b), np.linalg.norm(flat)))
                multipliers, now = multipliers + now * gap, now * growth
            wanted = (flat - b - multipliers / now).reshape(g, m, s, k)
            norms = np.sqrt((wanted**2).sum((1, 3), keepdims=True))
            a = (wanted * np.maximum(1 - l1 * unit1 / now / norms, 0)).reshape(g, m, s * k)
            u, d, vt = np.linalg.svd(flat - a - multipliers / now, full_matrices=False)
            b = (u * np.maximum(d - l2 * unit2 / now, 0)[:, None]) @ vt
            own[c.name] = [a, b, multipliers, now, (unit1, unit2)]
            split = state.layers[c.name]
            for found, expected in ((split.a, a), (split.b, b), (split.multipliers, multipliers), (split.m, flat)):
                np.testing.assert_allclose(found.numpy(), expected, atol=1e-11)
            assert split.t == pytest.approx(now)
            penalty += l1 * unit1 * np.sqrt((a.reshape(g, m, s, k) ** 2).sum((1, 3))).sum()
            penalty += l2 * unit2 * sum(np.linalg.norm(x, "nuc") for x in b)
            rank = max(np.linalg.matrix_rank(x, tol=1e-9) for x in b)
            kept = (np.abs(a.reshape(g, m, s, k)).sum((1, 3)) > 0).sum(1).max()
            assert state.sizes()[c.name] == (rank, kept)
        assert done.penalty == pytest.approx(penalty)
        if j > 0:
            assert done.residuals.primal == pytest.approx(max(primal))
        assert state.steps == j + 1
        move(plan, j)
    assert {c.name for c in plan.compressions} == {"conv", "grouped", "up", "fc"}


def test_gradients_are_those_of_the_augmented_lagrangian():
    net, plan = make()
    state, _ = split_step(plan, None, 0.05, 0.08, 0.2)
    move(plan, 1)
    state, _ = split_step(plan, state, 0.05, 0.08, 0.2, 1.5)
    move(plan, 2)
    for c in plan.compressions:
        split, w = state.layers[c.name], c.parameters[0]
        w.grad = None
        if c.name == "up":
            flat = w.flatten(1).T[None]
        else:
            flat = w.reshape(*((2, 6, -1) if c.name == "grouped" else (1, w.shape[0], -1)))
        gap = split.a + split.b - flat
        ((split.multipliers * gap).sum() + split.t / 2 * gap.square().sum()).backward()
        expected = w.grad.clone()
        w.grad = torch.ones_like(w)
        add_split_gradients_(plan, state, [w])
        torch.testing.assert_close(w.grad, 1 + expected)
        assert all(other.grad is None or other is w for other in net.parameters() if other.grad is not expected)
        w.grad = None


def test_balancing_moves_t_layer_by_layer():
    """Doubled while the weights stay far from A + B, halved where they are there."""
    _, plan = make()
    first, _ = split_step(plan, None, 0.05, 0.05, 0.1, rounds=50)
    state, _ = split_step(plan, first, 0.05, 0.05, 0.1, balance=True)
    assert {layer.t for layer in state.layers.values()} == {0.2}
    near = plan.compressions[0]
    for c in plan.compressions[:1]:
        split = state.layers[c.name]
        c.write_((split.a + split.b).reshape(c.read().shape))
    state, _ = split_step(plan, state, 0.05, 0.05, 0.1, balance=True)
    assert state.layers[near.name].t == 0.1
    assert all(state.layers[c.name].t >= 0.2 for c in plan.compressions if c is not near)


def test_what_is_deployed():
    _, plan = make(Net())
    before = {c.name: c.read().clone() for c in plan.compressions}
    state, _ = split_step(plan, None, 0.15, 0.1, 0.1)
    choices, structures = deployed(plan, state)
    assert choices == choices_of(plan, state)
    for c in plan.compressions:
        size = state.sizes()[c.name]
        assert choices[c.name].rank == (size if any(size) else (0,))
        theta, split = structures[c.name].reconstruct(), state.layers[c.name]
        error = float((before[c.name] - theta).norm())
        own = float((before[c.name].flatten() - (split.a + split.b).flatten()).norm())
        assert error <= own * (1 + 1e-9)
        if c.settled(choices[c.name]) == DENSE:
            assert error == 0
    write_weights_(plan, structures)
    assert any(c.settled(choices[c.name]) not in (DENSE, ZERO) for c in plan.compressions)


def test_large_lambdas_leave_the_bias_alone():
    _, plan = make()
    state, _ = split_step(plan, None, 10.0, 10.0, 0.1)
    choices, structures = deployed(plan, state)
    assert set(choices.values()) == {ZERO}
    assert not any(structure.reconstruct().any() for structure in structures.values())


def test_a_checkpoint_is_exact():
    _, plan = make()
    state, _ = split_step(plan, None, 0.05, 0.08, 0.2)
    move(plan, 1)
    state, _ = split_step(plan, state, 0.05, 0.08, 0.2)
    again = Splits.from_dict(state.to_dict(plan), plan)
    assert again.sizes() == state.sizes()
    assert again.norms == state.norms
    assert (again.steps, again.unchanged) == (state.steps, state.unchanged)
    move(plan, 2)
    one, two = (split_step(plan, each, 0.05, 0.08, 0.2)[0] for each in (state, again))
    for name, layer in one.layers.items():
        assert all(torch.equal(getattr(layer, x), getattr(two.layers[name], x)) for x in ("m", "a", "b", "multipliers"))
    other = make(Net())[1]
    values = state.to_dict(plan)
    name = other.compressions[0].name
    with pytest.raises(ValueError, match="expected the same network"):
        Splits.from_dict({**values, "layers": {name: values["layers"]["grouped"]}}, other)


def test_weights_that_are_not_finite():
    net, plan = make()
    net.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'fc'"):
        split_step(plan, None, 0.1, 0.1, 0.1)
