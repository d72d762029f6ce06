"""ADMM against a long run of accelerated proximal gradients, autograd and optimality conditions, in float64."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank_pl.linalg import Root
from lowrank_pl.linalg.admm import ADMMState, LinearResponse, Norms, solve

SHAPES = {"matrix": (1, 6, 8, 1), "kernel": (1, 5, 12, 3), "groups": (3, 4, 6, 2), "tall": (1, 12, 5, 1)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_problem(shape, correlated=True, lambdas=(0.3, 0.3)):
    """A weight that is low rank plus a few columns plus noise, and its response to inputs."""
    groups, m, n, width = shape
    weight = normal(groups, m, 2, seed=1) @ normal(groups, 2, n, seed=2) + 0.1 * normal(groups, m, n, seed=3)
    weight[..., :width] += 3 * normal(groups, m, width, seed=4)
    root = None
    if correlated:
        x = normal(groups, 5 * n, n, seed=5) @ normal(groups, n, n, seed=6)
        root = Root.of(x.mT @ x / x.shape[1])
    return LinearResponse.of(weight, root), weight, Norms.relative(weight, width, *lambdas)


@cache
def reference(shape, correlated, lambdas, steps=4000):
    """FISTA on both blocks at once."""
    response, weight, norms = make_problem(shape, correlated, lambdas)
    matrix, cross = response.root.matrix, response.cross
    step = response.energy / (4 * float(torch.linalg.eigvalsh(matrix).max()))  # two blocks: twice the curvature
    points = [torch.zeros_like(weight), torch.zeros_like(weight)]
    ahead, momentum = points, 1.0
    for _ in range(steps):
        gradient = 2 / response.energy * ((ahead[0] + ahead[1]) @ matrix - cross)
        u, s, vt = np.linalg.svd((ahead[1] - step * gradient).numpy(), full_matrices=False)
        b = torch.from_numpy((u * np.maximum(s - step * norms.lambda_2, 0)[..., None, :]) @ vt)
        blocks = (ahead[0] - step * gradient).unflatten(-1, (-1, norms.width))
        length = blocks.square().sum((1, 3), keepdim=True).sqrt()
        a = (blocks * (1 - step * norms.lambda_1 / length).clamp(min=0)).flatten(2)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = [new + (momentum - 1) / following * (new - old) for new, old in zip((a, b), points, strict=True)]
        points, momentum = [a, b], following
    return points


def objective(response, norms, a, b):
    blocks = a.unflatten(-1, (-1, norms.width))
    columns = blocks.square().sum((1, 3)).sqrt().sum()
    matrix = response.root.matrix
    answer = ((a + b) * ((a + b) @ matrix - 2 * response.cross)).sum() / response.energy + 1
    return float(answer + norms.lambda_1 * columns + norms.lambda_2 * torch.linalg.svdvals(b).sum())


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("lambdas", [(0.3, 0.3), (0.1, 0.4), (0.5, 0.1)])
@each_shape
def test_it_finds_the_minimum(shape, lambdas, correlated, balance):
    response, weight, norms = make_problem(shape, correlated, lambdas)
    state, history = solve(response, weight, norms, balance=balance, iterations=3000, tolerance=1e-7)
    expected = objective(response, norms, *reference(shape, correlated, lambdas))
    found = objective(response, norms, state.a, state.b)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(response.value(state.a + state.b) + norms.value(state.a, state.b), rel=1e-9)
    assert history[-1].largest < 1e-7
    assert float((state.a + state.b - state.m).norm()) <= 1e-6 * float(state.m.norm())


@each_shape
def test_residuals_fall(shape):
    """By a half or more from one hundred iterations to the next, until they are rounding."""
    response, weight, norms = make_problem(shape)
    _, history = solve(response, weight, norms, iterations=600, tolerance=0.0)
    largest = [max(r.largest for r in history[i : i + 100]) for i in range(0, 600, 100)]
    assert all(after <= max(before / 2, 1e-9) for before, after in pairwise(largest))


def test_balancing_makes_up_for_a_bad_t():
    response, weight, norms = make_problem(SHAPES["kernel"])
    steps = {
        (t, balance): len(solve(response, weight, norms, t, balance, 2000, 1e-4)[1])
        for t in (1.0, 1e-3, 1e3)
        for balance in (True, False)
    }
    assert steps[1e3, True] < steps[1e3, False] / 4
    assert steps[1e-3, True] < steps[1e-3, False] / 4
    assert max(steps[t, True] for t in (1.0, 1e-3, 1e3)) < 400


@pytest.mark.parametrize("correlated", [True, False])
@each_shape
def test_the_step_of_m_is_that_of_autograd(shape, correlated):
    """The gradient of the lecture's augmented Lagrangian, written out over samples, is 0 there."""
    groups, m, n, _ = shape
    response, weight, norms = make_problem(shape, correlated)
    if correlated:
        x = normal(groups, 5 * n, n, seed=5) @ normal(groups, n, n, seed=6)
        rows = torch.cat(
            [x / x.shape[1] ** 0.5, (1e-6 * x.square().mean()) ** 0.5 * torch.eye(n).expand(groups, n, n)], 1
        )
    else:
        rows = torch.eye(n).double().expand(groups, n, n)
    state = ADMMState.at(weight, 0.7).fitted(norms)
    state = ADMMState(state.m, state.a, state.b, normal(groups, m, n, seed=7) / 10, 0.7)
    found = response.nearest(state.anchor, state.t, state.m).requires_grad_()
    wanted = rows @ weight.mT
    energy = wanted.square().sum()
    gap = state.a + state.b - found
    lagrangian = (wanted - rows @ found.mT).square().sum() / energy
    lagrangian = lagrangian + (state.multipliers * gap).sum() + state.t / 2 * gap.square().sum()
    lagrangian.backward()
    slope = torch.autograd.grad(state.t / 2 * (found - state.anchor).square().sum(), found)[0].norm()
    assert float(found.grad.norm()) <= 1e-5 * float(slope)


@each_shape
def test_multipliers_end_as_subgradients(shape):
    """Of both norms, with the other sign: what the dual residual measures."""
    response, weight, norms = make_problem(shape)
    state, _ = solve(response, weight, norms, iterations=3000, tolerance=1e-8)
    gradient = 2 / response.energy * (state.m @ response.root.matrix - response.cross)
    torch.testing.assert_close(state.multipliers, gradient, rtol=1e-6, atol=1e-8)
    _, _, _, width = shape
    for a, own in zip(
        state.a.unflatten(-1, (-1, width)).transpose(1, 2).flatten(0, 1),
        -state.multipliers.unflatten(-1, (-1, width)).transpose(1, 2).flatten(0, 1),
        strict=True,
    ):
        if a.any():
            torch.testing.assert_close(own, norms.lambda_1 * a / a.norm(), rtol=1e-4, atol=1e-5 * norms.lambda_1)
        else:
            assert float(own.norm()) <= norms.lambda_1 * (1 + 1e-6)
    assert float(torch.linalg.svdvals(state.multipliers).max()) <= norms.lambda_2 * (1 + 1e-6)


@each_shape
def test_units(shape):
    """The weight itself costs the lambdas; the unit of weights and of inputs has no effect, nor how many there are."""
    response, weight, norms = make_problem(shape, lambdas=(0.3, 0.2))
    zeros = torch.zeros_like(weight)
    assert norms.value(weight, zeros) == pytest.approx(0.3)
    assert norms.value(zeros, weight) == pytest.approx(0.2)
    assert response.value(zeros) == pytest.approx(1)
    assert response.value(weight) == pytest.approx(0, abs=1e-5)
    one, _ = solve(response, weight, norms)
    scaled = LinearResponse.of(100 * weight, Root(response.root.factor * 1e-3))
    other, _ = solve(scaled, 100 * weight, Norms.relative(100 * weight, norms.width, 0.3, 0.2))
    torch.testing.assert_close(other.a, 100 * one.a)
    torch.testing.assert_close(other.b, 100 * one.b)
    twice = torch.cat([weight, weight])
    both, _ = solve(LinearResponse.of(twice), twice, Norms.relative(twice, norms.width, 0.3, 0.2))
    alone, _ = solve(LinearResponse.of(weight), weight, Norms.relative(weight, norms.width, 0.3, 0.2))
    torch.testing.assert_close(both.b, torch.cat([alone.b, alone.b]), rtol=1e-3, atol=1e-3)


def test_large_lambdas_leave_nothing():
    response, weight, norms = make_problem(SHAPES["kernel"], lambdas=(30.0, 30.0))
    state, _ = solve(response, weight, norms)
    assert not state.a.any()
    assert not state.b.any()
    columns, _ = solve(response, weight, Norms.relative(weight, 3, 0.2, 30.0))
    assert columns.a.any()
    assert not columns.b.any()


def test_zeros():
    weight = torch.zeros(1, 3, 4).double()
    state, _ = solve(LinearResponse.of(weight), weight, Norms.relative(weight, 1, 0.1, 0.1))
    assert not state.m.any()
    assert not state.a.any()


def test_not_finite():
    weight = normal(1, 3, 4)
    norms = Norms.relative(weight, 1, 0.1, 0.1)
    weight[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        ADMMState.at(weight, 1.0).fitted(norms)
