"""C steps and penalty against brute force, autograd and the paper's formulas."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from nets import Net, svd
from torch import nn

from lowrank_pl.costs import Macs, Params
from lowrank_pl.decompositions import (
    CP,
    DENSE,
    SVD,
    ZERO,
    BlockSVD,
    Cheapest,
    Choice,
    SeparableSVD,
    SpatialSVD,
    TiledSVD,
    Tucker2,
)
from lowrank_pl.decompositions.tucker2 import HigherOrderSVD
from lowrank_pl.methods import LCState, add_penalty_gradients_, c_step, least_lambda, least_mu
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import CostBudget, CostPenalty
from lowrank_pl.structures import Chain, Constant, Dense
from lowrank_pl.tracing import record

METHODS = {
    "svd": SVD(),
    "spatial": {"*conv*": SpatialSVD(), "*": SVD()},
    "block": BlockSVD(4),
    "tiled": TiledSVD(4),
    "tucker": {"*conv*": Tucker2(), "*": SVD()},
    "separable": {"*conv*": SeparableSVD(), "*": SVD()},
    "cp": {"*conv*": CP(), "*": SVD()},
    "cheapest": Cheapest("svd", {"*": "tucker2"}["*"], "spatial_svd"),
}


def double_net(seed=0):
    torch.manual_seed(seed)
    net = Net().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def plan_for(net, method, rule):
    return make_plan(net, method, rule, None, record(net, torch.randn(2, 3, 8, 8, dtype=torch.float64)), training=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_c_step_against_brute_force(method, normalize):
    """Over all ranks, with every projection made and its error taken in float64."""
    net = double_net()
    rule = CostPenalty(30.0 if normalize else 200.0, "macs")
    plan = plan_for(net, METHODS[method], rule)
    state, done = c_step(plan, rule, None, mu=0.1, next_mu=0.12, normalize=normalize)
    torch.manual_seed(1)
    with torch.no_grad():
        for c in plan.compressions:
            c.parameters[0].add_(0.1 * torch.randn_like(c.read()))
    after, done = c_step(plan, rule, state, mu=0.12, next_mu=0.144, normalize=normalize)
    total = 0.0
    for c in plan.compressions:
        shifted = c.read() - state.beta(c.name) / 0.12
        price = rule.lambda_ / 1e6 * (state.scales[c.name] if normalize else 1.0)
        if normalize:
            assert state.scales[c.name] != 1.0
        values = []
        for choice in all_choices(c):
            theta = c.problem(shifted).structure(choice).reconstruct()
            values.append(price * c.cost(rule.cost, choice) + 0.06 * float((shifted - theta).square().sum()))
        own = price * c.cost(rule.cost, after.choices[c.name])
        own += 0.06 * float((shifted - after.structures[c.name].reconstruct()).square().sum())
        exact = not any(isinstance(d, Tucker2 | SeparableSVD | CP) for d in c.method.candidates(c.layer))
        if exact:
            assert own == pytest.approx(min(values), rel=1e-9)
        else:  # the choice is by a bound of the error, or an estimate
            assert min(values) - 1e-12 <= own <= 1.2 * min(values)
        total += own
    beta = sum(0.06 * float((state.beta(c.name) / 0.12).square().sum()) for c in plan.compressions)
    assert done.after == pytest.approx(total - beta, rel=1e-9)


def all_choices(c):
    """Every rank of every structure that the layer may take and that is cheaper; its bias alone; its weight."""
    yield ZERO
    members = c.method.members if isinstance(c.method, Cheapest) else (c.method,)
    for member in members:
        if member.unsupported(c.layer) is not None:
            continue
        full = member.full_rank(c.layer)
        grids = torch.cartesian_prod(*[torch.arange(1, most + 1) for most in full]).reshape(-1, len(full))
        for rank in grids.tolist():
            if c.is_cheaper(Choice(member, tuple(rank))):
                yield Choice(member, tuple(rank))
    yield DENSE


def test_the_multipliers_are_those_of_algorithm_1():
    """With beta and Theta written out, over several C steps."""
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    mus = [0.05 * 1.5**j for j in range(6)]
    beta = {c.name: torch.zeros_like(c.read()) for c in plan.compressions}
    state = None
    for j, (mu, next_mu) in enumerate(pairwise(mus)):
        state, _ = c_step(plan, rule, state, mu, next_mu)
        for c in plan.compressions:
            theta = state.structures[c.name].reconstruct()
            shifted = c.read() - beta[c.name] / mu
            u, s, v = torch.linalg.svd(shifted.flatten(1), full_matrices=False)
            choice = state.choices[c.name]
            if choice not in (DENSE, ZERO):
                (r,) = choice.rank
                torch.testing.assert_close(theta, ((u[:, :r] * s[:r]) @ v[:r]).view_as(theta))
            beta[c.name] -= mu * (c.read() - theta)
            torch.testing.assert_close(state.beta(c.name), beta[c.name], atol=1e-12, rtol=1e-9)
        assert state.steps == j + 1
        torch.manual_seed(j)
        with torch.no_grad():
            for c in plan.compressions:
                c.parameters[0].add_(0.05 * torch.randn_like(c.read()))


@pytest.mark.parametrize("augmented", [True, False])
def test_the_penalty_gradient_is_that_of_autograd(augmented):
    net = double_net()
    rule = CostPenalty(300.0, "macs")
    plan = plan_for(net, "svd", rule)
    state, _ = c_step(plan, rule, None, 0.3, 0.36, augmented=augmented)
    loss = net(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().mean()
    whole = loss
    for c in plan.compressions:
        theta, beta = state.structures[c.name].reconstruct(), state.beta(c.name)
        assert bool(beta.any()) == augmented
        gap = c.parameters[0] - theta
        whole = whole + 0.18 * gap.square().sum() - (beta * gap).sum()  # mu/2 ||W - Theta||^2 - beta (W - Theta)
    expected = torch.autograd.grad(whole, list(net.parameters()), retain_graph=True)
    loss.backward()
    add_penalty_gradients_(plan, state)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_only_some_parameters_and_parameters_without_a_gradient():
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    state, _ = c_step(plan, rule, None, 0.3, 0.36)
    add_penalty_gradients_(plan, state, [net.conv2.weight, net.conv1.weight])
    assert net.fc1.weight.grad is None
    assert net.conv1.weight.grad is None
    torch.testing.assert_close(net.conv2.weight.grad, 0.36 * (net.conv2.weight.detach() - state.anchors["conv2"]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "rule", [CostPenalty(30.0, "macs"), CostPenalty(3.0, "params"), CostBudget("macs", 0.6)], ids=str
)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_c_step_never_increases_the_augmented_lagrangian(method, rule, normalize):
    net = double_net()
    plan = plan_for(net, METHODS[method], rule)
    state, mu = None, 0.02
    for j in range(12):
        state, done = c_step(plan, rule, state, mu, 1.3 * mu, normalize)
        assert done.after <= done.before * (1 + 1e-12) + 1e-15
        mu *= 1.3
        torch.manual_seed(j)
        with torch.no_grad():
            for c in plan.compressions:
                c.parameters[0].add_(0.03 * torch.randn_like(c.read())).mul_(0.99)
        if isinstance(rule, CostBudget):
            spent = sum(c.cost(rule.cost, state.choices[c.name]) for c in plan.compressions)
            spent += sum(rule.cost(spec) for spec in plan.others(plan.compressions))
            assert spent <= 0.6 * sum(rule.cost(spec) for spec in plan.specs.values())


def test_a_worse_theta_is_not_taken(monkeypatch):
    """Tucker-2's projection is not the best one; where it comes out worse than the Theta at hand, that stays."""
    net = double_net()
    with torch.no_grad():
        net.conv2.weight.copy_(svd(net.conv2.weight, 2))
    rule = CostPenalty(1.0, "macs")
    plan = plan_for(net, METHODS["tucker"], rule)
    state, _ = c_step(plan, rule, None, 0.2, 0.2)
    (conv,) = [c for c in plan.compressions if c.name == "conv2"]
    assert isinstance(state.structures["conv2"].layout, Chain)
    original = HigherOrderSVD.factor

    def bad(self, rank):
        structure = original(self, rank)
        return structure.with_tensors([1.5 * t for t in structure.tensors])

    monkeypatch.setattr(HigherOrderSVD, "factor", bad)
    after, done = c_step(plan, rule, state, 0.2, 0.2)
    assert after.structures["conv2"] is state.structures["conv2"]
    assert done.after <= done.before
    assert conv.name in after.anchors


def test_weights_and_state_are_left_alone_and_nan_is_named():
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    before = {c.name: c.read().clone() for c in plan.compressions}
    state, _ = c_step(plan, rule, None, 0.1, 0.12)
    kept = {name: anchor.clone() for name, anchor in state.anchors.items()}
    c_step(plan, rule, state, 0.12, 0.144)
    with torch.no_grad():
        net.conv2.weight.add_(1.0)
        assert all(torch.equal(kept[name], anchor) for name, anchor in state.anchors.items())
        net.conv2.weight.sub_(1.0)
        torch.testing.assert_close(net.conv2.weight.detach(), before["conv2"])
        net.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'fc1'"):
        c_step(plan, rule, state, 0.12, 0.144)
    assert all(torch.equal(kept[name], anchor) for name, anchor in state.anchors.items())


def test_rank_0_before_batch_norm_has_no_penalty():
    net = double_net()
    rule = CostPenalty(1e9, "macs")
    plan = plan_for(net, "svd", rule)
    state, done = c_step(plan, rule, None, 1e-6, 1e-6, normed=["conv2"])
    assert state.choices == {"conv2": ZERO, "fc1": ZERO}
    assert state.free == ("conv2",)
    assert done.gap == 1.0  # of fc1 alone
    add_penalty_gradients_(plan, state)
    assert net.conv2.weight.grad is None
    assert net.fc1.weight.grad is not None
    assert not state.beta("conv2").any()


def test_the_mu_above_which_ranks_are_not_0():
    net = double_net()
    rule = CostPenalty(1e3, "macs")
    plan = plan_for(net, "svd", rule)
    state, _ = c_step(plan, rule, None, 1e-9, 1e-9)
    assert set(state.choices.values()) == {ZERO}
    some, every = least_mu(plan, rule, state.scales)
    for mu, alive in ((0.999 * some, 0), (1.001 * some, 1), (0.999 * every, 1), (1.001 * every, 2)):
        choices = c_step(plan, rule, None, mu, mu)[0].choices
        assert sum(choice != ZERO for choice in choices.values()) == alive


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_lambda_above_which_not_all_is_dense(method, normalize):
    """Found by bisection, with C steps."""
    net, mu = double_net(), 0.3
    plan = plan_for(net, METHODS[method], CostPenalty(0.0, "macs"))
    state = c_step(plan, CostPenalty(0.0, "macs"), None, mu, mu, normalize)[0]

    def is_dense(lambda_):
        choices = c_step(plan, CostPenalty(lambda_, "macs"), None, mu, mu, normalize)[0].choices
        return all(choice == DENSE for choice in choices.values())

    low, high = 0.0, 1e6
    assert is_dense(low)
    assert not is_dense(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_dense(middle) else (low, middle)
    assert least_lambda(plan, CostPenalty(0.0, "macs"), state, mu) == pytest.approx(low, rel=1e-6)


def test_the_lambda_after_a_shift_by_the_multipliers():
    """All dense at the second C step only, when it sees W - beta / mu."""
    net = double_net()
    plan = plan_for(net, "svd", CostPenalty(50.0))
    before = c_step(plan, CostPenalty(50.0), None, 0.1, 3.0)[0]
    assert before.beta("conv2").any()
    after = c_step(plan, CostPenalty(1e-3), before, 3.0, 3.0)[0]
    assert all(choice == DENSE for choice in after.choices.values())
    least = least_lambda(plan, CostPenalty(1e-3), after, 3.0)
    for lambda_, dense in ((0.999 * least, True), (1.001 * least, False)):
        choices = c_step(plan, CostPenalty(lambda_), before, 3.0, 3.0)[0].choices
        assert all(choice == DENSE for choice in choices.values()) == dense


@pytest.mark.parametrize("method", METHODS)
def test_the_state_survives_a_checkpoint(method, tmp_path):
    net = double_net()
    rule = CostPenalty(10.0, "macs")
    plan = plan_for(net, METHODS[method], rule)
    state, _ = c_step(plan, rule, None, 0.05, 0.06)
    torch.save(state.to_dict(plan), tmp_path / "state.pt")
    again = LCState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True), plan)
    assert again.choices == state.choices
    for name in state.anchors:
        assert torch.equal(again.anchors[name], state.anchors[name])
        assert torch.equal(again.structures[name].reconstruct(), state.structures[name].reconstruct())
    plain = [f.name for f in dataclasses.fields(state) if f.name not in ("structures", "anchors")]
    assert all(getattr(again, name) == getattr(state, name) for name in plain)


def as_before(plan, choices, mu=0.06):
    """A dictionary as the version before layouts and choices wrote it, made by hand: ranks with the number of the
    structure before them and zeros for none, factors as the operators of the stages, nothing for rank 0."""
    ranks, factors, anchors = {}, {}, {}
    for c in plan.compressions:
        ranks[c.name], anchors[c.name] = choices[c.name], c.read() + 1
        u, s, v = torch.linalg.svd(c.read().flatten(1), full_matrices=False)
        r = ranks[c.name][-1]
        if r == 0:
            factors[c.name] = []
        elif r == min(u.shape[0], v.shape[1]):
            factors[c.name] = [c.read().clone()]
        else:
            right, left = v[:r].unflatten(1, c.layer.operator_shape[1:]), u[:, :r] * s[:r]
            factors[c.name] = [right, left.reshape(*left.shape, *[1] * len(c.layer.kernel))]
    numbers = {"mu": mu, "steps": 3, "scales": dict.fromkeys(ranks, 2.0), "free": [], "unchanged": 1}
    return {"ranks": ranks, "factors": factors, "anchors": anchors, **numbers}


@pytest.mark.parametrize(
    ("method", "stored"),
    [
        ("svd", {"conv2": [0], "fc1": [3]}),
        ("svd", {"conv2": [12], "fc1": [0]}),
        ("svd", {"conv2": [2], "fc1": [16]}),
        (Cheapest("tucker2", "spatial_svd", "svd"), {"conv2": [0, 0, 0], "fc1": [0, 0]}),
        (Cheapest("tucker2", "spatial_svd", "svd"), {"conv2": [2, 3], "fc1": [2, 4]}),
        (Cheapest("tucker2", "spatial_svd", "svd"), {"conv2": [0, 8, 12], "fc1": [2, 16]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_state_of_the_version_before_is_read(method, stored, on_disk, tmp_path):
    net = double_net()
    rule = CostPenalty(10.0, "macs")
    plan = plan_for(net, method, rule)
    values = as_before(plan, stored)
    if on_disk:
        torch.save(values, tmp_path / "state.pt")
        values = torch.load(tmp_path / "state.pt", weights_only=True)
    state = LCState.from_dict(values, plan)
    assert (state.mu, state.steps, state.free, state.unchanged) == (0.06, 3, (), 1)
    for c in plan.compressions:
        *_, r = stored[c.name]
        structure, full = state.structures[c.name], c.layer.out_channels
        kind, choice = (Constant, ZERO) if r == 0 else (Dense, DENSE) if r == full else (Chain, Choice(SVD(), (r,)))
        assert state.choices[c.name] == choice
        assert type(structure.layout) is kind
        assert structure.layout.macs is not None
        assert tuple(t.shape for t in structure.tensors) == structure.layout.shapes()
        theta = svd(c.read(), r)
        assert structure.reconstruct().dtype == torch.float64
        torch.testing.assert_close(structure.reconstruct(), theta)
        torch.testing.assert_close(state.beta(c.name), 0.06 * (c.read() + 1 - theta))
    assert state.to_dict(plan)["ranks"] == stored
    after, done = c_step(plan, rule, state, 0.06, 0.08)
    assert after.steps == 4
    assert done.after <= done.before


def test_at_most_two_copies_of_the_targets():
    net = double_net()
    rule = CostPenalty(1.0, "params")
    plan = plan_for(net, "svd", rule)
    for lambda_ in (0.0, 1.0, 100.0):
        state, _ = c_step(plan, CostPenalty(lambda_, Params()), None, 0.05, 0.06)
        tensors = [*state.anchors.values(), *(t for s in state.structures.values() for t in s.tensors)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        own = sum(c.read().untyped_storage().nbytes() for c in plan.compressions)
        assert sum(held.values()) <= 2 * own
        assert not {c.read().untyped_storage().data_ptr() for c in plan.compressions} & set(held)


def test_a_cost_of_the_network_is_what_pytorch_counts():
    net = double_net()
    rule = CostPenalty(10.0, Macs())
    plan = plan_for(net, "svd", rule)
    state, done = c_step(plan, rule, None, 0.05, 0.06, normalize=False)
    macs = sum(c.cost(Macs(), state.choices[c.name]) for c in plan.compressions)
    assert done.cost == pytest.approx(10.0 / 1e6 * macs)
