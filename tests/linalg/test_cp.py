"""ALS against tensorly, planted terms, the matrix SVD, and a tensor that has no best approximation."""

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from safetensors.torch import load_file
from tensorly.decomposition import parafac

from lowrank_pl.linalg import Terms, cp_als, expand
from lowrank_pl.linalg import cp as module
from lowrank_pl.linalg.cp import BOUND

tensorly.set_backend("numpy")

SHARED_DATA = os.environ.get("LOWRANK_PL_SHARED_DATA", "")
SHAPES = [(10, 8, 3, 3), (6, 9, 5), (5, 14, 1, 3), (1, 6, 5, 5), (7, 4, 2, 3, 2), (3, 2, 11), (12, 7), (9, 1, 1)]


def random_tensor(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compose(terms):
    """Multiplied out, term by term."""
    total = torch.zeros([len(factor) for factor in terms.factors], dtype=torch.float64)
    for columns in zip(*(factor.T for factor in terms.factors), strict=True):
        term = columns[0]
        for column in columns[1:]:
            term = term[..., None] * column
        total += term
    return total


def planted_tensor(shape, rank, noise=0.0):
    exact = compose(Terms(tuple(random_tensor((n, rank), n + 10 * i) for i, n in enumerate(shape))))
    return exact / exact.norm() + noise * random_tensor(shape, 1) / math.prod(shape) ** 0.5


def squared(tensor):
    return float(tensor.double().square().sum())


def fitted(tensor, rank, **options):
    return cp_als(tensor, expand(tensor), rank, **options)


def reference(tensor, rank, sweeps, seed=0):
    """The squared error of tensorly's ALS, and its terms' squared norms, as shares."""
    found = parafac(tensor.double().numpy(), rank, n_iter_max=sweeps, init="svd", tol=0, random_state=seed)
    rest = np.square(tensorly.cp_to_tensor(found) - tensor.double().numpy()).sum()
    sizes = found.weights * np.prod([np.linalg.norm(factor, axis=0) for factor in found.factors], axis=0)
    return rest / squared(tensor), np.square(sizes).sum() / squared(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expansion(shape, dtype):
    """Orthogonal terms, largest first, that add up to the tensor: as many as all sizes but the largest allow."""
    tensor = random_tensor(shape).to(dtype)
    terms = expand(tensor)
    full = math.prod(shape) // max(shape)
    assert [tuple(factor.shape) for factor in terms.factors] == [(n, full) for n in shape]
    assert all(factor.dtype == torch.float64 for factor in terms.factors)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert float((compose(terms) - tensor).norm()) <= tolerance * float(tensor.norm())
    each = torch.stack([compose(Terms(tuple(f[:, r : r + 1] for f in terms.factors))).flatten() for r in range(full)])
    overlap = each @ each.T
    torch.testing.assert_close(overlap, torch.diag(terms.energies), rtol=1e-6, atol=10 * tolerance * squared(tensor))
    assert (terms.energies.diff() <= tolerance * squared(tensor)).all()
    assert len(terms.tails) == full + 1
    rank = full // 2
    rest = tensor - compose(terms.first(rank))
    assert squared(rest) == pytest.approx(float(terms.tails[rank]), rel=1e-5, abs=tolerance * squared(tensor))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_never_worse_than_the_largest_terms_and_better_by_every_sweep(shape):
    tensor = random_tensor(shape)
    terms = expand(tensor)
    for rank in {1, 2, len(terms.energies) // 3 + 1, len(terms.energies)}:
        if rank > len(terms.energies):
            continue
        errors = [float(terms.tails[rank])]
        for sweeps in (1, 2, 5, 10, 30, 100):
            found, error = cp_als(tensor, terms, rank, sweeps=sweeps)
            assert error == pytest.approx(squared(tensor - compose(found)), rel=1e-6, abs=1e-12 * squared(tensor))
            assert float(found.energies.sum()) <= BOUND * squared(tensor)
            lengths = torch.stack([factor.norm(dim=0) for factor in found.factors])
            torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
            errors.append(error)
        # the penalty may cost a little of what is left
        assert all(after <= 1.01 * before + 1e-12 * squared(tensor) for before, after in pairwise(errors))


@pytest.mark.parametrize("shape", [(12, 7), (9, 1, 1), (6, 1, 4, 1)], ids=str)
def test_of_a_matrix_it_is_the_svd(shape):
    tensor = random_tensor(shape)
    singular = np.linalg.svd(tensor.squeeze().reshape(shape[0], -1).numpy(), compute_uv=False)
    for rank in range(1, math.prod(shape) // max(shape) + 1):
        found, error = fitted(tensor, rank)
        expected = np.square(singular[rank:]).sum()
        assert error == pytest.approx(expected, abs=1e-12 * squared(tensor))
        assert squared(tensor - compose(found)) == pytest.approx(expected, abs=1e-12 * squared(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "rank"), [((12, 8, 3, 3), 3), ((12, 8, 3, 3), 10), ((6, 8, 3), 4), ((9, 5, 2, 3, 2), 6)], ids=str
)
def test_recovers_planted_terms(shape, rank, dtype):
    tensor = planted_tensor(shape, rank).to(dtype)
    found, _ = fitted(tensor, rank, sweeps=300)
    assert float((tensor - compose(found)).norm()) <= 1e-6 * float(tensor.norm())


@pytest.mark.parametrize(
    ("shape", "rank", "noise"),
    [
        ((16, 12, 3, 3), 10, 0.3),
        ((16, 12, 3, 3), 30, 0.3),
        ((10, 14, 3, 3), 8, 1.0),
        ((9, 12, 7), 6, 0.3),
        ((8, 8, 2, 3, 3), 9, 0.5),
    ],
    ids=str,
)
def test_no_worse_than_tensorly(shape, rank, noise):
    """The norm of what is left after as many sweeps, at the planted rank and away from it."""
    tensor = planted_tensor(shape, rank, noise)
    for r in (rank // 2, rank, 2 * rank):
        assert fitted(tensor, r)[1] ** 0.5 <= 1.02 * (reference(tensor, r, 100)[0] * squared(tensor)) ** 0.5, r


def test_terms_that_would_cancel_each_other_stay_small(monkeypatch):
    """`a a b + a b a + b a a` is no sum of two terms, but a limit of such sums, whose terms grow beyond all bounds."""
    a, b = random_tensor((8,), 1), random_tensor((8,), 2)
    a, b = a / a.norm(), b - (a @ b) / (a @ a) * a
    tensor = sum(torch.einsum("i,j,k->ijk", *three) for three in ((a, a, b), (a, b, a), (b, a, a)))
    assert reference(tensor, 2, 1000)[1] > BOUND
    for bound in (BOUND, 3.0):
        monkeypatch.setattr(module, "BOUND", bound)
        found, error = fitted(tensor, 2, sweeps=1000)
        assert float(found.energies.sum()) <= bound * squared(tensor)
        assert error <= 0.01 * squared(tensor)
    monkeypatch.setattr(module, "BOUND", math.inf)
    monkeypatch.setattr(module, "PENALTY", 0.0)
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    assert float(fitted(tensor, 2, sweeps=1000)[0].energies.sum()) > BOUND * squared(tensor)


def test_restarts():
    """Never worse, the same ones every time, and now and then better."""
    tensors = [random_tensor((10, 8, 3, 3), seed) for seed in range(4)]
    alone = [fitted(tensor, 12)[1] for tensor in tensors]
    more = [fitted(tensor, 12, restarts=3) for tensor in tensors]
    assert all(error <= before for (_, error), before in zip(more, alone, strict=True))
    assert any(error < 0.995 * before for (_, error), before in zip(more, alone, strict=True))
    again, _ = fitted(tensors[0], 12, restarts=3)
    assert all(map(torch.equal, more[0][0].factors, again.factors))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scales(scale):
    tensor = planted_tensor((6, 5, 3, 3), 4).float() * scale
    found, error = fitted(tensor, 4)
    assert all(torch.isfinite(factor).all() for factor in found.factors)
    assert float((tensor - compose(found)).norm()) <= 1e-3 * float(tensor.double().norm())
    assert error <= 1e-6 * squared(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad, dtype):
    tensor = random_tensor((6, 5, 3, 3)).to(dtype)
    tensor[2, 3, 1, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        expand(tensor)


TRAINED = [("20", i) for i in (2, 5, 8, 11, 14, 17)] + [("56", i) for i in (3, 20, 30, 50)]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA, reason="LOWRANK_PL_SHARED_DATA does not name a folder with trained ResNets")
@pytest.mark.parametrize("share", [2, 4])
@pytest.mark.parametrize(("depth", "number"), TRAINED)
def test_no_worse_than_tensorly_on_trained_kernels(depth, number, share):
    """The norm of what is left, at a half and a quarter of the weights, with smaller terms."""
    weights = load_file(Path(SHARED_DATA) / f"resnet{depth}-cifar10.safetensors")
    kernel = [w for w in weights.values() if w.dim() == 4 and w.shape[2] == 3][number]
    rank = kernel.numel() // share // sum(kernel.shape)
    found, error = fitted(kernel, rank)
    theirs, size = reference(kernel, rank, 100)
    assert error**0.5 <= 1.02 * (theirs * squared(kernel)) ** 0.5
    assert float(found.energies.sum()) <= min(BOUND, size) * squared(kernel)
