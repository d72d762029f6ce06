"""C steps and penalty against brute force, autograd and the paper's formulas."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from nets import Net, svd
from torch import nn

from lowrank_pl.compression import make_plan
from lowrank_pl.costs import Macs, Params
from lowrank_pl.decompositions import SVD, BlockSVD, Chain, Cheapest, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.methods import LCState, add_penalty_gradients_, c_step, least_lambda, least_mu
from lowrank_pl.ranks import CostBudget, CostPenalty
from lowrank_pl.surgery import record

METHODS = {
    "svd": SVD(),
    "spatial": {"*conv*": SpatialSVD(), "*": SVD()},
    "block": BlockSVD(4),
    "tiled": TiledSVD(4),
    "tucker": {"*conv*": Tucker2(), "*": SVD()},
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
            c.parameter.add_(0.1 * torch.randn_like(c.weight))
    after, done = c_step(plan, rule, state, mu=0.12, next_mu=0.144, normalize=normalize)
    total = 0.0
    for c in plan.compressions:
        shifted = c.weight - state.beta(c.name) / 0.12
        price = rule.lambda_ / 1e6 * (state.scales[c.name] if normalize else 1.0)
        if normalize:
            assert state.scales[c.name] != 1.0
        values = []
        for rank in all_ranks(c):
            theta = c.factor(shifted, rank).reconstruct()
            values.append(price * c.cost(rule.cost, rank) + 0.06 * float((shifted - theta).square().sum()))
        own = price * c.cost(rule.cost, after.ranks[c.name])
        own += 0.06 * float((shifted - after.structures[c.name].reconstruct()).square().sum())
        exact = not any(isinstance(d, Tucker2) for d in (c.decomposition, *getattr(c.decomposition, "members", ())))
        if exact:
            assert own == pytest.approx(min(values), rel=1e-9)
        else:  # the choice is by a bound of the error, the projection may be better
            assert min(values) - 1e-12 <= own <= 1.2 * min(values)
        total += own
    beta = sum(0.06 * float((state.beta(c.name) / 0.12).square().sum()) for c in plan.compressions)
    assert done.after == pytest.approx(total - beta, rel=1e-9)


def all_ranks(c):
    members = [((), c.decomposition)]
    if isinstance(c.decomposition, Cheapest):
        members = [((i,), m) for i, m in enumerate(c.decomposition.members) if m.unsupported(c.layer) is None]
    yield (0,) * len(c.decomposition.full_rank(c.layer))
    for start, member in members:
        full = member.full_rank(c.layer)
        grids = torch.cartesian_prod(*[torch.arange(1, most + 1) for most in full]).reshape(-1, len(full))
        for rank in grids.tolist():
            if c.is_cheaper((*start, *rank)):
                yield (*start, *rank)
    yield c.decomposition.full_rank(c.layer)


def test_the_multipliers_are_those_of_algorithm_1():
    """With beta and Theta written out, over several C steps."""
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    mus = [0.05 * 1.5**j for j in range(6)]
    beta = {c.name: torch.zeros_like(c.weight) for c in plan.compressions}
    state = None
    for j, (mu, next_mu) in enumerate(pairwise(mus)):
        state, _ = c_step(plan, rule, state, mu, next_mu)
        for c in plan.compressions:
            theta = state.structures[c.name].reconstruct()
            shifted = c.weight - beta[c.name] / mu
            u, s, v = torch.linalg.svd(shifted.flatten(1), full_matrices=False)
            (r,) = state.ranks[c.name]
            if c.is_cheaper((r,)):
                torch.testing.assert_close(theta, ((u[:, :r] * s[:r]) @ v[:r]).view_as(theta))
            beta[c.name] -= mu * (c.weight - theta)
            torch.testing.assert_close(state.beta(c.name), beta[c.name], atol=1e-12, rtol=1e-9)
        assert state.steps == j + 1
        torch.manual_seed(j)
        with torch.no_grad():
            for c in plan.compressions:
                c.parameter.add_(0.05 * torch.randn_like(c.weight))


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
        gap = c.parameter - theta
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
                c.parameter.add_(0.03 * torch.randn_like(c.weight)).mul_(0.99)
        if isinstance(rule, CostBudget):
            spent = sum(c.cost(rule.cost, state.ranks[c.name]) for c in plan.compressions)
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
    assert isinstance(state.structures["conv2"], Chain)
    original = Tucker2._factor

    def bad(self, weight, layer, rank):
        structure = original(self, weight, layer, rank)
        return structure.with_tensors([1.5 * t for t in structure.tensors()])

    monkeypatch.setattr(Tucker2, "_factor", bad)
    after, done = c_step(plan, rule, state, 0.2, 0.2)
    assert after.structures["conv2"] is state.structures["conv2"]
    assert done.after <= done.before
    assert conv.name in after.anchors


def test_weights_and_state_are_left_alone_and_nan_is_named():
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    before = {c.name: c.weight.clone() for c in plan.compressions}
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
    assert state.ranks == {"conv2": (0,), "fc1": (0,)}
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
    assert not any(any(rank) for rank in state.ranks.values())
    some, every = least_mu(plan, rule, state.scales)
    for mu, alive in ((0.999 * some, 0), (1.001 * some, 1), (0.999 * every, 1), (1.001 * every, 2)):
        ranks = c_step(plan, rule, None, mu, mu)[0].ranks
        assert sum(any(rank) for rank in ranks.values()) == alive


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_lambda_above_which_not_all_is_dense(method, normalize):
    """Found by bisection, with C steps."""
    net, mu = double_net(), 0.3
    plan = plan_for(net, METHODS[method], CostPenalty(0.0, "macs"))
    state = c_step(plan, CostPenalty(0.0, "macs"), None, mu, mu, normalize)[0]

    def is_dense(lambda_):
        ranks = c_step(plan, CostPenalty(lambda_, "macs"), None, mu, mu, normalize)[0].ranks
        return not any(c.is_cheaper(ranks[c.name]) or not any(ranks[c.name]) for c in plan.compressions)

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
    assert not any(c.is_cheaper(after.ranks[c.name]) for c in plan.compressions)
    least = least_lambda(plan, CostPenalty(1e-3), after, 3.0)
    for lambda_, dense in ((0.999 * least, True), (1.001 * least, False)):
        ranks = c_step(plan, CostPenalty(lambda_), before, 3.0, 3.0)[0].ranks
        assert any(c.is_cheaper(ranks[c.name]) for c in plan.compressions) != dense


@pytest.mark.parametrize("method", METHODS)
def test_the_state_survives_a_checkpoint(method, tmp_path):
    net = double_net()
    rule = CostPenalty(10.0, "macs")
    plan = plan_for(net, METHODS[method], rule)
    state, _ = c_step(plan, rule, None, 0.05, 0.06)
    torch.save(state.to_dict(), tmp_path / "state.pt")
    again = LCState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True), plan)
    assert again.ranks == state.ranks
    for name in state.anchors:
        assert torch.equal(again.anchors[name], state.anchors[name])
        assert torch.equal(again.structures[name].reconstruct(), state.structures[name].reconstruct())
    plain = [f.name for f in dataclasses.fields(state) if f.name not in ("structures", "anchors")]
    assert all(getattr(again, name) == getattr(state, name) for name in plain)


def test_at_most_two_copies_of_the_targets():
    net = double_net()
    rule = CostPenalty(1.0, "params")
    plan = plan_for(net, "svd", rule)
    for lambda_ in (0.0, 1.0, 100.0):
        state, _ = c_step(plan, CostPenalty(lambda_, Params()), None, 0.05, 0.06)
        tensors = [*state.anchors.values(), *(t for s in state.structures.values() for t in s.tensors())]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        own = sum(c.weight.untyped_storage().nbytes() for c in plan.compressions)
        assert sum(held.values()) <= 2 * own
        assert not {c.weight.untyped_storage().data_ptr() for c in plan.compressions} & set(held)


def test_a_cost_of_the_network_is_what_pytorch_counts():
    net = double_net()
    rule = CostPenalty(10.0, Macs())
    plan = plan_for(net, "svd", rule)
    state, done = c_step(plan, rule, None, 0.05, 0.06, normalize=False)
    macs = sum(c.cost(Macs(), state.ranks[c.name]) for c in plan.compressions)
    assert done.cost == pytest.approx(10.0 / 1e6 * macs)
