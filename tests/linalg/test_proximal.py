"""Proximal steps against subgradients, autograd, and scipy's minimizers of the same objective, in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lowrank_pl.linalg import column_norms, shrink_columns, shrink_singular_values

SHAPES = [(4, 6), (9, 4), (5, 5), (1, 4), (6, 2), (2, 3, 8), (3, 1, 5, 2)]
THRESHOLDS = (0.0, 0.3, 1.5, 2.5, 100.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] % 2 == 0])
def test_columns_satisfy_the_optimality_conditions(shape, width, threshold):
    """`C - X` is the threshold times the unit vector along X, or no longer than the threshold where X is 0."""
    matrix = normal(*shape)
    found, norms = shrink_columns(matrix, threshold, width)
    torch.testing.assert_close(norms, column_norms(found, width))
    for index in np.ndindex(*shape[:-2], shape[-1] // width):
        *batch, i = index
        block = (*batch, slice(None), slice(i * width, (i + 1) * width))
        x, rest = found[block], matrix[block] - found[block]
        if x.any():
            torch.testing.assert_close(rest, threshold * x / x.norm())
        else:
            assert float(rest.norm()) <= threshold + 1e-12
    if threshold in (0.0, 100.0):
        assert bool(norms.all()) == bool(norms.any()) == (threshold == 0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_satisfy_the_optimality_conditions(shape, threshold):
    """`C - X` is the threshold times `U V^T + W`, W orthogonal to both and of a spectral norm of at most 1."""
    matrix = normal(*shape)
    found, values = shrink_singular_values(matrix, threshold)
    for batch in np.ndindex(*shape[:-2]):
        rest = (matrix[batch] - found[batch]).numpy()
        u, s, vt = np.linalg.svd(found[batch].numpy(), full_matrices=False)
        rank = int((values[batch] > 0).sum())
        np.testing.assert_allclose(s, values[batch], atol=1e-12)
        u, vt = u[:, :rank], vt[:rank]
        other = rest - threshold * u @ vt
        np.testing.assert_allclose(u.T @ other, 0, atol=1e-12)
        np.testing.assert_allclose(other @ vt.T, 0, atol=1e-12)
        assert np.linalg.norm(other, 2) <= threshold + 1e-12
        if threshold in (0.0, 100.0):
            assert rank == (min(shape[-2:]) if threshold == 0 else 0)


@pytest.mark.parametrize("step", [shrink_columns, shrink_singular_values])
def test_the_gradient_vanishes_where_nothing_else_does(step):
    """By autograd, where the norm can be differentiated."""
    matrix = normal(4, 6)
    found = step(matrix, 0.2)[0].requires_grad_()
    norm = torch.linalg.vector_norm(found, dim=0).sum() if step is shrink_columns else torch.linalg.svdvals(found).sum()
    (0.2 * norm + (found - matrix).square().sum() / 2).backward()
    assert float(found.grad.abs().max()) <= 1e-12


@pytest.mark.parametrize("threshold", [0.5, 1.5, 2.2])
@pytest.mark.parametrize("step", [shrink_columns, shrink_singular_values])
def test_no_minimizer_finds_less(step, threshold):
    """Scipy's, of the same objective with its corners rounded off by 1e-5."""
    matrix = normal(3, 4, seed=2)

    def objective(x, rounding=1e-10):
        if step is shrink_columns:
            norm = (x.square().sum(0) + rounding).sqrt().sum()
        else:
            norm = torch.linalg.eigvalsh(x @ x.mT + rounding * torch.eye(3)).clamp(min=0).sqrt().sum()
        return threshold * norm + (x - matrix).square().sum() / 2

    def with_gradient(x):
        point = torch.from_numpy(x).view(3, 4).requires_grad_()
        value = objective(point)
        value.backward()
        return value.item(), point.grad.flatten().numpy()

    found = step(matrix, threshold)[0]
    for start in (matrix, normal(3, 4, seed=3)):
        result = minimize(with_gradient, start.flatten().numpy(), jac=True, method="L-BFGS-B", tol=1e-12)
        assert float(objective(found, 0.0)) <= result.fun + 1e-10
        assert result.fun == pytest.approx(float(objective(found)), rel=1e-3)


@pytest.mark.parametrize("step", [shrink_columns, shrink_singular_values])
def test_float32(step):
    """As exact as the weights are; zeros stay zeros; the argument is left as it is."""
    matrix = normal(6, 20).float()
    before = matrix.clone()
    found, values = step(matrix, 2.0)
    exact, _ = step(matrix.double(), 2.0)
    assert found.dtype == torch.float32
    assert values.dtype == torch.float64
    assert torch.equal(matrix, before)
    assert float((found - exact).norm()) <= 1e-6 * float(exact.norm())
    zeros, values = step(torch.zeros(3, 4), 0.0)
    assert not zeros.any()
    assert not values.any()


def test_not_finite():
    with pytest.raises(ValueError, match="finite"):
        shrink_singular_values(torch.full((2, 3), torch.nan), 1.0)
