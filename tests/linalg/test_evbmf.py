"""EVBMF on planted ranks, and against a minimization by scipy."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lowrank_pl.linalg import evb_rank

SIZES = [(20, 30), (64, 576), (100, 100), (16, 144), (50, 500)]


def energies(rows, columns, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) + noise * rng.normal(size=(rows, columns))
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def by_scipy(values, rows, columns):
    """Nakajima et al. (2013): the noise by a bounded minimization of the free energy, then the threshold."""
    alpha = rows / columns
    tau = 2.5129 * np.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)

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
