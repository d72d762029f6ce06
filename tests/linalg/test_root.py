"""`Root` against dense float64 matrices."""

import pytest
import torch

from lowrank_pl.linalg import Root
from lowrank_pl.linalg.regression import regress
from lowrank_pl.linalg.root import SHRINKAGE

G, N = 2, 12
KINDS = ("full", "deficient", "diagonal", "samples", "zero")


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(kind):
    """And the matrix that it stands for."""
    rows = randn(G, 5 if kind == "deficient" else 40, N) * torch.logspace(0, -2, N, dtype=torch.float64)
    second = rows.mT @ rows
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(N, dtype=torch.float64)
    if kind == "zero":
        return Root.of(second * 0), eye.expand(G, N, N)
    if kind == "diagonal":
        return Root.diagonal(second.diagonal(dim1=1, dim2=2)), (second + SHRINKAGE * mean * eye) * eye
    if kind == "samples":
        floor = torch.tensor([0.5, 0.01], dtype=torch.float64)
        with_floor = second + floor[:, None, None] * eye
        mean = mean + floor[:, None, None]
        return Root.from_samples(rows, floor), with_floor + SHRINKAGE * mean * eye
    return Root.of(second), second + SHRINKAGE * mean * eye


def close(a, b, scale):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(scale))


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_inverses(kind):
    root, matrix = make(kind)
    assert root.size == N
    close(root.matrix, matrix, matrix.abs().max())
    w = randn(G, 3, N, seed=1)
    close(root.times(w) @ root.times(w).mT, w @ matrix @ w.mT, matrix.abs().max())
    square = root.square
    close(square.matrix, matrix, matrix.abs().max())
    torch.testing.assert_close(square.solve(square.times(w)), w, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(square.divide(w) @ matrix, w, rtol=1e-6, atol=1e-6)
    inverse = torch.linalg.inv(matrix)
    assert float((square.divide(w) - w @ inverse).norm()) <= 1e-8 * float((w @ inverse).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_parts(kind):
    root, matrix = make(kind)
    scale, shape = matrix.abs().max(), (2, 3, 2)
    split = matrix.view(G, *shape, *shape)
    close(root.marginal(shape, [0]).matrix, torch.einsum("gabcdbc->gad", split), scale)
    close(root.marginal(shape, [0, 2]).matrix, torch.einsum("gabcdbf->gacdf", split).reshape(G, 4, 4), scale)
    close(root.marginal(shape, [0, 1, 2]).matrix, matrix, scale)
    blocks = root.blocks(2, 2, 4).matrix
    close(blocks, torch.stack([matrix[:, 2:6, 2:6], matrix[:, 6:10, 6:10]], 1), scale)
    repeated = root.repeated(3).matrix
    close(repeated, torch.stack([torch.kron(m, torch.eye(3, dtype=torch.float64)) for m in matrix]), scale)
    by = torch.tensor([0.3, 2.0], dtype=torch.float64)
    raised = root.square.raised(by).matrix
    close(raised, matrix + by[:, None, None] * torch.eye(N, dtype=torch.float64), scale)
    close(root.unsqueeze(1).matrix, matrix.unsqueeze(1), scale)
    close(root.unsqueeze(1).squeeze(1).matrix, matrix, scale)
    assert root.to(torch.device("cpu")).size == N


def test_of_a_singular_matrix_without_shrinkage_there_is_an_inverse():
    rows = randn(1, 4, N)
    root = Root.of(rows.mT @ rows, 0.0)
    w = randn(1, 3, N, seed=1)
    assert torch.isfinite(root.divide(w)).all()
    torch.testing.assert_close(root.solve(root.times(w)), w, rtol=1e-5, atol=1e-5)


def test_scale_does_not_matter():
    second = randn(G, 3, N).mT @ randn(G, 3, N)
    w = randn(G, 3, N, seed=1)
    small, large = (Root.of(second * scale).times(w) / scale**0.5 for scale in (1e-200, 1e200))
    torch.testing.assert_close(small @ small.mT, large @ large.mT, rtol=1e-9, atol=1e-9)


def test_regression_against_lstsq():
    target, features = randn(G, 3, 40), randn(G, 7, 40, seed=1)
    expected = torch.linalg.lstsq(features.mT, target.mT).solution.mT
    torch.testing.assert_close(regress(target, features), expected, rtol=1e-9, atol=1e-9)
    twice = torch.cat([features, features[:, :2]], 1)  # of several solutions the smallest
    expected = torch.linalg.lstsq(twice.mT, target.mT, driver="gelsd").solution.mT
    torch.testing.assert_close(regress(target, twice), expected, rtol=1e-6, atol=1e-8)
