"""EVBMF on planted ranks, and against minimizations by scipy."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar

from lowrank_pl.linalg import evb_rank
from lowrank_pl.linalg.evbmf import evb_threshold

SIZES = [(20, 30), (64, 576), (100, 100), (16, 144), (50, 500)]


def energies(rows, columns, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) + noise * rng.normal(size=(rows, columns))
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def threshold_by_scipy(alpha):
    """Nakajima et al. (2013), equation 30, as printed."""

    def phi(z):
        return np.log(z + 1) / z - 1 / 2

    tau = brentq(lambda tau: phi(tau) + phi(tau / alpha), 1e-9, 10, xtol=1e-14, rtol=1e-14)
    return (1 + tau) * (1 + alpha / tau)


def by_scipy(values, rows, columns):
    """Nakajima et al. (2013): the noise by a bounded minimization of the free energy, then the threshold."""
    alpha = rows / columns
    edge = threshold_by_scipy(alpha)

    def free_energy(noise):
        x = values / (columns * noise)
        above, below = x[x > edge], x[x <= edge]
        t = (above - (1 + alpha) + np.sqrt((above - (1 + alpha)) ** 2 - 4 * alpha)) / 2
        kept = (above - t + np.log((t + 1) / above) + alpha * np.log(t / alpha + 1)).sum()
        return (below - np.log(below)).sum() + kept

    first = int(np.ceil(rows / (1 + alpha)) - 1)
    low = max(values[first] / (columns * edge), values[first:].mean() / columns)
    result = minimize_scalar(free_energy, bounds=(low, values.sum() / (rows * columns)), method="bounded")
    return int((values > columns * result.x * edge).sum())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_planted_ranks_are_found(size, rank, noise):
    values = energies(*size, rank, noise)
    assert evb_rank(values, size[1]) == rank == by_scipy(values, *size)
    assert evb_rank(values * 1e-20, size[1]) == rank


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pure_noise_has_no_rank(size):
    assert evb_rank(energies(*size, 0, 1.0), size[1]) == 0


def test_without_noise_and_without_anything():
    assert evb_rank(energies(20, 50, 4, 0.0), 50) == 4
    assert evb_rank(np.zeros(7), 9) == 0
    assert evb_rank(np.ones(1), 9) in (0, 1)


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5, 1 / 9, 0.05, 0.01, 1e-3, 1e-4, 1e-6])
def test_the_threshold_solves_the_papers_equation(alpha):
    assert evb_threshold(alpha) == pytest.approx(threshold_by_scipy(alpha), rel=1e-10)


def least_free_energy(square, rows, columns, noise):
    """Of one component with the singular value `square ** 0.5`, beside that of leaving it out; by brute force.

    Twice the variational free energy of a component has the means a, b of its two vectors, the variances u, v of their
    entries, and the priors' variances, best at the mean squares of an entry: `M log(1 + p) + L log(1 + q) -
    2 sigma a b / noise + (a^2 + M u) (b^2 + L v) / noise` with `p = a^2 / (M u)` and `q = b^2 / (L v)`. At the best
    `M u L v` that is the function below of `s = p / (1 + p)` and `t = q / (1 + q)`.
    """
    s = 1 - np.geomspace(1e-6, 1, 2_000)[:-1]
    t = np.maximum(1 - rows * noise / (square * s), 0.0)  # where its derivative is 0
    return np.min(-columns * np.log(1 - s) - rows * np.log(1 - t) - square / noise * s * t)


def test_the_free_energy_of_these_tests():
    """Against a minimization over all four numbers."""

    def free_energy(logs):
        a, b, u, v = np.exp(logs)
        left, right = a**2 + 30 * u, b**2 + 20 * v
        return 30 * np.log(left / (30 * u)) + 20 * np.log(right / (20 * v)) - 2 * 200**0.5 * a * b + left * right

    found = minimize(free_energy, np.log([2.5, 2.5, 0.1, 0.1]), method="Nelder-Mead", options={"fatol": 1e-9})
    assert least_free_energy(200.0, 20, 30, 1.0) == pytest.approx(found.fun, rel=1e-4)
    assert least_free_energy(400.0, 20, 30, 2.0) == pytest.approx(found.fun, rel=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (20, 180), (10, 500), (5, 1000), (5, 50_000)])
def test_at_the_threshold_keeping_a_component_costs_what_dropping_it_does(rows, columns):
    edge = evb_threshold(rows / columns) * columns
    assert least_free_energy(edge * 1.001, rows, columns, 1.0) < -1e-3
    assert least_free_energy(edge * 0.999, rows, columns, 1.0) > 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(4, 80), (6, 300), (12, 60), (12, 12)])
def test_the_rank_against_the_free_energy_itself(rows, columns):
    """Noise and rank together: the least free energy of the whole matrix, over a grid of noise variances."""
    rng = np.random.default_rng(rows)
    seen = set()
    for strength in (0.0, 0.3, 0.5, 0.7, 1.0, 3.0):  # a component beside the threshold, and one three times as strong
        u, v = np.linalg.qr(rng.normal(size=(rows, 2)))[0], np.linalg.qr(rng.normal(size=(columns, 2)))[0]
        planted = strength * columns**0.5 * u * [3, 1] @ v.T
        values = np.linalg.svd(rng.normal(size=(rows, columns)) + planted, compute_uv=False) ** 2
        found = []
        for variance in np.geomspace(0.3, 1.5, 161):
            gains = [least_free_energy(value, rows, columns, variance) for value in values]
            total = rows * columns * np.log(variance) + values.sum() / variance + np.minimum(gains, 0.0).sum()
            found.append((total, sum(gain < 0 for gain in gains)))
        assert evb_rank(values, columns) == min(found)[1], strength
        seen.add(min(found)[1])
    assert {0, 1, 2} <= seen
