"""C steps and penalty in metrics: against autograd, closed forms and dense float64 matrices."""

import pytest
import torch
from nets import Net, images
from torch import nn

from lowrank_pl.decompositions import DENSE, SVD, ZERO, BlockSVD, Cheapest, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.linalg import Root
from lowrank_pl.methods import LCState, RunningMoments, add_penalty_gradients_, c_step, distort_, least_lambda, least_mu
from lowrank_pl.methods.learning_compression import SHRINKAGE
from lowrank_pl.metric import Metric
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import CostBudget, CostPenalty, FixedRank
from lowrank_pl.tracing import record

METHODS = {
    "svd": SVD(),
    "spatial": {"*conv*": SpatialSVD(), "*": SVD()},
    "block": BlockSVD(4),
    "tiled": TiledSVD(4),
    "tucker": {"*conv*": Tucker2(), "*": SVD()},
    "cheapest": Cheapest("svd", "tucker2", "spatial_svd"),
}


def double_net():
    torch.manual_seed(0)
    net = Net().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def plan_for(net, method, rule):
    return make_plan(net, method, rule, None, record(net, torch.randn(2, 3, 8, 8, dtype=torch.float64)), training=True)


def metrics_of(net, plan, gradients=False, seed=0):
    moments = RunningMoments(gradients=gradients)
    moments.start(net, [c.name for c in plan.compressions], seed)
    x, y = images(seed=seed + 1)
    nn.functional.cross_entropy(net(x.double()), y).backward()
    moments.stop()
    net.zero_grad()
    return moments.metrics(plan)


def move_(plan, seed, size=0.05):
    torch.manual_seed(seed)
    with torch.no_grad():
        for c in plan.compressions:
            c.parameters[0].add_(size * torch.randn_like(c.read()))


def dense(root):
    """The matrix with mean eigenvalue 1 that learning-compression makes of it."""
    matrix = root.matrix[0]
    n = len(matrix)
    return (matrix * n / matrix.trace() + SHRINKAGE * torch.eye(n)) / (1 + SHRINKAGE)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("augmented", [True, False])
def test_the_penalty_gradient_is_that_of_autograd(gradients, augmented):
    net, rule = double_net(), CostPenalty(300.0, "macs")
    plan = plan_for(net, "svd", rule)
    metrics = metrics_of(net, plan, gradients)
    state, _ = c_step(plan, rule, None, 0.3, 0.36, augmented=augmented, metrics=metrics)
    move_(plan, 1)
    whole = 0.0
    for c in plan.compressions:
        a = dense(metrics[c.name].inputs)
        b = dense(metrics[c.name].outputs) if gradients else torch.eye(c.layer.out_channels).double()
        gap = (c.parameters[0] - state.structures[c.name].reconstruct()).flatten(1)
        beta = state.beta(c.name).flatten(1)
        assert bool(beta.any()) == augmented
        whole = whole + 0.18 * torch.trace(b @ gap @ a @ gap.T) - torch.trace(b @ beta @ a @ gap.T)
    targets = [c.parameters[0] for c in plan.compressions]
    expected = torch.autograd.grad(whole, targets)
    add_penalty_gradients_(plan, state)
    for parameter, gradient in zip(targets, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_theta_is_the_reduced_rank_regression_of_the_shifted_weight():
    net, rule = double_net(), CostPenalty(3.0, "macs")
    plan, state, found_any = plan_for(net, "svd", rule), None, False
    for j in range(3):
        metrics = metrics_of(net, plan, seed=j)
        before = state
        state, _ = c_step(plan, rule, state, 0.1 * 1.2**j, 0.1 * 1.2 ** (j + 1), metrics=metrics)
        for c in plan.compressions:
            shifted = c.read() - (before.beta(c.name) / before.mu if before else 0)
            root = torch.linalg.cholesky(dense(metrics[c.name].inputs))
            u, s, v = torch.linalg.svd(shifted.flatten(1) @ root, full_matrices=False)
            choice = state.choices[c.name]
            if choice not in (DENSE, ZERO):
                (r,) = choice.rank
                best = torch.linalg.solve(root, (u[:, :r] * s[:r]) @ v[:r], left=False)
                found = state.structures[c.name].reconstruct().flatten(1)
                torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-9)
            if before is None:
                assert state.scales[c.name] == pytest.approx(float(s.square().sum()), rel=1e-9)
        found_any = found_any or any(choice not in (DENSE, ZERO) for choice in state.choices.values())
        move_(plan, j)
    assert found_any


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", [CostPenalty(30.0, "macs"), CostBudget("macs", 0.6)], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_c_step_never_increases_the_augmented_lagrangian(method, rule, gradients):
    """Whatever the metric is from one C step to the next."""
    net = double_net()
    plan, state, mu = plan_for(net, METHODS[method], rule), None, 0.02
    for j in range(8):
        metrics = metrics_of(net, plan, gradients, seed=j)
        old = state
        state, done = c_step(plan, rule, state, mu, 1.3 * mu, metrics=metrics)
        assert done.after <= done.before * (1 + 1e-12) + 1e-15
        written = 0.0
        for c in plan.compressions:
            norm = metrics[c.name].normalized(SHRINKAGE).squared_norm
            beta = torch.zeros_like(c.read()) if old is None else old.beta(c.name)
            written += mu / 2 * norm(c.read() - state.structures[c.name].reconstruct() - beta / mu)
            written -= mu / 2 * norm(beta / mu)
        assert done.after - done.cost == pytest.approx(written, rel=1e-6)
        mu *= 1.3
        move_(plan, j, 0.03)


def test_metrics_are_kept_exactly_until_the_next_c_step():
    net, rule = double_net(), CostPenalty(300.0, "macs")
    plan = plan_for(net, "svd", rule)
    metrics = metrics_of(net, plan, gradients=True)
    del metrics["fc1"]  # nobody has seen its inputs
    state, _ = c_step(plan, rule, None, 0.3, 0.36, metrics=metrics)
    again = LCState.from_dict(state.to_dict(plan), plan)
    move_(plan, 0)
    gradients = []
    for each in (state, again):
        net.zero_grad()
        add_penalty_gradients_(plan, each)
        gradients.append({c.name: c.parameters[0].grad.clone() for c in plan.compressions})
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())
    fc1 = net.fc1.weight.detach()
    torch.testing.assert_close(gradients[0]["fc1"], 0.36 * (fc1 - state.anchors["fc1"]))
    without = {key: value for key, value in state.to_dict(plan).items() if key != "metrics"}
    assert LCState.from_dict(without, plan).metrics == {}  # of 0.2


def test_the_first_c_step_says_how_stiff_metrics_may_be():
    net, rule = double_net(), CostPenalty(300.0, "macs")
    plan = plan_for(net, "svd", rule)
    metrics, state = metrics_of(net, plan, gradients=False), None
    for j in range(2):
        state, _ = c_step(plan, rule, state, 0.3, 0.36, metrics=metrics, stiffest=2.0 + j)
        state = LCState.from_dict(state.to_dict(plan), plan)
        assert state.stiffest == 2.0
        assert max(metric.largest for metric in state.metrics.values()) == pytest.approx(2.0)
        for c in plan.compressions:
            values, vectors = torch.linalg.eigh(dense(metrics[c.name].inputs))
            expected = vectors @ torch.diag(values.clamp(max=2.0)) @ vectors.mT
            torch.testing.assert_close(state.metrics[c.name].inputs.matrix[0], expected, rtol=1e-6, atol=1e-6)


def test_metrics_without_preference_change_nothing():
    net, rule = double_net(), CostPenalty(30.0, "macs")
    plan, states = plan_for(net, "svd", rule), []
    eyes = {}
    for c in plan.compressions:
        n = c.layer.num_weights // c.layer.out_channels
        eyes[c.name] = Metric(c.layer, Root.of(7 * torch.eye(n).double()[None]))
    for metrics in (None, eyes):
        state, done = c_step(plan, rule, None, 0.1, 0.12, metrics=metrics)
        states.append((state, done))
    (plain, a), (other, b) = states
    assert plain.choices == other.choices
    assert a.after == pytest.approx(b.after, rel=1e-6)
    for name, anchor in plain.anchors.items():
        torch.testing.assert_close(other.anchors[name], anchor, rtol=1e-5, atol=1e-7)


def test_thresholds():
    """With mu just below the smaller one every rank is 0; with lambda just above the threshold one is not dense."""
    net = double_net()
    rule = CostPenalty(30.0, "macs")
    plan = plan_for(net, "svd", rule)
    metrics = metrics_of(net, plan)
    state, _ = c_step(plan, rule, None, 1e-6, 1e-6, metrics=metrics)
    some, every = least_mu(plan, rule, state.scales, state.metrics)
    for mu, zeros in ((0.999 * some, 2), (1.001 * some, 1), (1.001 * every, 0)):
        state, _ = c_step(plan, rule, None, mu, mu, metrics=metrics)
        assert sum(choice == ZERO for choice in state.choices.values()) == zeros
    rule = CostPenalty(1e-6, "macs")
    state, _ = c_step(plan, rule, None, 1.0, 1.0, metrics=metrics)
    assert set(state.choices.values()) == {DENSE}
    least = least_lambda(plan, rule, state, 1.0)
    for factor, is_dense in ((0.999, True), (1.001, False)):
        state, _ = c_step(plan, CostPenalty(factor * least, "macs"), None, 1.0, 1.0, metrics=metrics)
        assert (set(state.choices.values()) == {DENSE}) == is_dense


def test_distortions_in_a_metric():
    net = double_net()
    plan = make_plan(net, "svd", FixedRank(3), training=True)
    metrics = metrics_of(net, plan)
    before = {c.name: c.read().clone() for c in plan.compressions}
    distort_(plan, metrics=metrics)
    for c in plan.compressions:
        root = torch.linalg.cholesky(metrics[c.name].inputs.matrix[0])
        u, s, v = torch.linalg.svd(before[c.name].flatten(1) @ root, full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        torch.testing.assert_close(c.read().flatten(1) @ root, best, rtol=1e-7, atol=1e-8)
