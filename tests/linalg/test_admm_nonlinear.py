"""The step of M behind an activation against autograd, the closed form, and scipy."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from lowrank_pl.linalg import Root
from lowrank_pl.linalg.admm import LinearResponse, Norms, solve
from lowrank_pl.linalg.admm_nonlinear import NonlinearResponse

GROUPS, ROWS, M, N = 2, 400, 3, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows():
    weight = normal(GROUPS, M, N, seed=1)
    x = normal(GROUPS, ROWS, N, seed=2) @ normal(GROUPS, N, N, seed=3) + 1
    return weight, x, x @ weight.mT + 0.3


def normed_relu(y):
    """Batch norm, then ReLU."""
    scale = torch.linspace(0.5, 2, GROUPS * M, dtype=y.dtype)
    return F.relu(y * scale - 0.2)


def written_out(weight, x, y, follow, m):
    """The value, with all groups' outputs side by side."""
    centred = (x - x.mean(1, keepdim=True)) @ m.mT + y.mean(1, keepdim=True)
    join = lambda z: torch.cat(list(z), dim=1)  # noqa: E731
    wanted, base = follow(join(y)), follow(join(y.mean(1, keepdim=True)))
    return (follow(join(centred)) - wanted).square().sum() / (wanted - base).square().sum()


def test_without_an_activation_it_is_the_linear_one():
    weight, x, y = rows()
    response = NonlinearResponse.of(x, y, lambda z: z)
    centred = x - x.mean(1, keepdim=True)
    linear = LinearResponse.of(weight, Root.of(centred.mT @ centred / ROWS, 0.0))
    target, start = normal(GROUPS, M, N, seed=4), normal(GROUPS, M, N, seed=5)
    torch.testing.assert_close(response.nearest(target, 0.3, start), linear.nearest(target, 0.3, start))
    assert response.value(start) == pytest.approx(linear.value(start))
    assert response.value(0 * weight) == pytest.approx(1)
    assert response.value(weight) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("follow", [F.relu, normed_relu])
def test_steps_lead_down_to_where_the_gradient_is_0(follow):
    weight, x, y = rows()
    response, target, t = NonlinearResponse.of(x, y, follow), normal(GROUPS, M, N, seed=4), 0.05

    def objective(m):
        return written_out(weight, x, y, follow, m) + t / 2 * (m - target).square().sum()

    m = normal(GROUPS, M, N, seed=5)
    assert response.value(m) == pytest.approx(float(written_out(weight, x, y, follow, m)))
    values = [float(objective(m))]
    for _ in range(300):
        m = response.nearest(target, t, m)
        values.append(float(objective(m)))
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    at = m.clone().requires_grad_()
    objective(at).backward()
    assert float(at.grad.norm()) <= 1e-6 * float(normal(GROUPS, M, N, seed=5).norm())

    def with_gradient(z):
        point = torch.from_numpy(z).view_as(m).requires_grad_()
        value = objective(point)
        value.backward()
        return value.item(), point.grad.flatten().numpy()

    found = minimize(with_gradient, m.flatten().numpy(), jac=True, method="L-BFGS-B", tol=1e-12)
    assert values[-1] <= found.fun + 1e-6


def test_admm_with_it():
    """It settles, and what it leaves answers better behind the ReLU than what the linear response leaves."""
    weight, x, y = rows()
    norms = Norms.relative(weight, 1, 0.3, 0.3)
    response = NonlinearResponse.of(x, y, F.relu)
    state, history = solve(response, weight, norms, iterations=600, tolerance=1e-4)
    assert history[-1].largest < 1e-4
    centred = x - x.mean(1, keepdim=True)
    other, _ = solve(LinearResponse.of(weight, Root.of(centred.mT @ centred / ROWS, 0.0)), weight, norms)

    def whole(split):
        return response.value(split.a + split.b) + norms.value(split.a, split.b)

    assert whole(state) < whole(other)


def test_outputs_that_do_not_vary():
    _, x, y = rows()
    with pytest.raises(ValueError, match="all the same"):
        NonlinearResponse.of(x, y - 1e3, F.relu)
