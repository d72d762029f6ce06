"""Truncation against float64 SVDs of numpy."""

import numpy as np
import pytest
import torch

from lowrank_pl.linalg import (
    decompose,
    leading_vectors,
    left_system,
    singular_energies,
    squared_norm,
    tail_energies,
)


def with_singular_values(rows, columns, values, seed=0):
    """A matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return left * np.asarray(values) @ right.T


RANDOM = np.random.default_rng(1).standard_normal((9, 14))
MATRICES = {
    "zero": np.zeros((6, 9)),
    "square": RANDOM[:, :9],
    "tall": np.random.default_rng(2).standard_normal((15, 4)),
    "wide": np.random.default_rng(3).standard_normal((4, 15)),
    "row": RANDOM[:1],
    "column": RANDOM[:, :1],
    "number": RANDOM[:1, :1],
    "zero_row": np.zeros((1, 5)),
    "rank_3": with_singular_values(12, 20, [5.0, 2.0, 1.0]),
    "rank_1_tall": np.outer(np.arange(15.0), np.ones(6)),
    "orthogonal": with_singular_values(8, 8, [1.0] * 8),
    "repeated": with_singular_values(10, 16, [3.0] * 3 + [1.0] * 4 + [0.5] * 3),
    "graded": with_singular_values(12, 12, 10.0 ** -np.arange(12)),
    "tiny": RANDOM * 1e-30,
    "huge": RANDOM * 1e30,
    "zero_columns": RANDOM * (np.arange(14) % 3 == 0),
    "batch": np.stack([RANDOM, 0 * RANDOM, 1e-30 * RANDOM, 1e30 * RANDOM, np.ones((9, 14))]).reshape(5, 1, 9, 14),
    "tall_batch": np.random.default_rng(4).standard_normal((2, 3, 11, 4)),
    "empty_batch": np.zeros((0, 4, 5)),
}  # fmt: skip
DTYPES = (torch.float32, torch.float64)
# Rounding, relative to the norm: that of float32 weights themselves, and of a float64 SVD.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 1e-14}

each_matrix = pytest.mark.parametrize("name", MATRICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(name, dtype):
    """The matrix in `dtype`, the same numbers in numpy's float64, their singular values and their norms."""
    matrix = torch.tensor(MATRICES[name], dtype=dtype)
    exact = matrix.double().numpy()
    return matrix, exact, np.linalg.svd(exact, compute_uv=False), np.linalg.norm(exact, axis=(-2, -1))


@each_dtype
@each_matrix
def test_residual_is_optimal(name, dtype):
    matrix, exact, singular, norm = problem(name, dtype)
    system = decompose(matrix)
    for rank in range(1, singular.shape[-1] + 1):
        left, right = system.truncate(rank)
        assert left.dtype == right.dtype == torch.float64
        assert left.shape == (*matrix.shape[:-1], rank)
        assert right.shape == (*matrix.shape[:-2], rank, matrix.shape[-1])
        residual = np.linalg.norm(exact - (left @ right).numpy(), axis=(-2, -1))
        optimum = np.linalg.norm(singular[..., rank:], axis=-1)
        assert (residual <= (1 + 1e-6) * optimum + ROUNDING[dtype] * norm).all()


@each_dtype
@each_matrix
def test_factors_are_balanced(name, dtype):
    matrix, _, singular, norm = problem(name, dtype)
    left, right = decompose(matrix).truncate(singular.shape[-1])
    columns, rows = np.linalg.norm(left.numpy(), axis=-2), np.linalg.norm(right.numpy(), axis=-1)
    np.testing.assert_allclose(columns, rows, rtol=1e-10, atol=1e-200)
    assert (np.abs(rows**2 - singular) <= ROUNDING[dtype] * norm[..., None]).all()


@each_dtype
@each_matrix
def test_energies(name, dtype):
    matrix, _, singular, norm = problem(name, dtype)
    tail = np.cumsum(singular[..., ::-1] ** 2, axis=-1)[..., ::-1]
    expected = np.append(tail, 0 * tail[..., :1], axis=-1)
    error = 1e-14 * (norm**2)[..., None] * matrix.shape[-1]
    system = decompose(matrix)
    for energies in (system.energies, singular_energies(matrix), left_system(matrix)[0]):
        tails = tail_energies(energies)
        assert tails.dtype == energies.dtype == torch.float64
        assert energies.shape == singular.shape
        assert (np.abs(energies.numpy() - singular**2) <= error).all()
        assert (np.abs(tails.numpy() - expected) <= error).all()
        assert (energies >= 0).all()
        assert (tails.diff(dim=-1) <= 0).all()
        assert (tails[..., -1] == 0).all()
    assert torch.equal(system.tails, tail_energies(system.energies))


@each_dtype
@each_matrix
def test_vectors(name, dtype):
    """Of the shorter side, and of the left one: orthonormal, and every first few of them keep the most."""
    matrix, exact, singular, norm = problem(name, dtype)
    slack = 1e-14 * matrix.shape[-1] * norm**2
    short = exact if exact.shape[-2] <= exact.shape[-1] else np.swapaxes(exact, -2, -1)
    for basis, wide in ((decompose(matrix).basis, short), (left_system(matrix)[1], exact)):
        assert basis.dtype == torch.float64
        vectors = basis.numpy()
        assert vectors.shape == (*wide.shape[:-1], singular.shape[-1])
        gram = np.swapaxes(vectors, -2, -1) @ vectors
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(singular.shape[-1]), gram.shape), atol=1e-12)
        kept = np.square(np.swapaxes(vectors, -2, -1) @ wide).sum(-1)
        for rank in range(1, singular.shape[-1] + 1):
            assert (kept[..., :rank].sum(-1) >= np.square(singular[..., :rank]).sum(-1) - slack).all()


@each_dtype
@each_matrix
def test_leading_vectors(name, dtype):
    matrix, exact, singular, norm = problem(name, dtype)
    slack = 1e-14 * matrix.shape[-1] * norm**2
    rows, columns = matrix.shape[-2:]
    for rank in {1, 2, columns, rows // 2, rows} & set(range(1, rows + 1)):  # more vectors than columns too
        vectors = leading_vectors(matrix, rank).numpy()
        gram = np.swapaxes(vectors, -2, -1) @ vectors
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(rank), gram.shape), atol=1e-12)
        kept = np.square(np.swapaxes(vectors, -2, -1) @ exact).sum((-2, -1))
        assert (kept >= np.square(singular[..., :rank]).sum(-1) - slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    matrix = torch.tensor(RANDOM, dtype=dtype)
    systems = decompose(matrix), decompose(matrix.float())
    for half, single in zip(*(system.truncate(3) for system in systems), strict=True):
        assert torch.equal(half, single)
    assert torch.equal(systems[0].tails, systems[1].tails)


def test_strides_do_not_matter():
    matrix = torch.tensor(RANDOM, dtype=torch.float32)
    strided = torch.zeros(18, 28)
    strided[::2, ::2] = matrix
    for a, b in zip(*(decompose(x).truncate(4) for x in (strided[::2, ::2], matrix)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "function",
    [decompose, singular_energies, left_system, lambda a: leading_vectors(a, 2)],
    ids=["decompose", "singular_energies", "left_system", "leading_vectors"],
)
def test_not_finite(function, bad, dtype):
    matrix = torch.tensor(MATRICES["batch"], dtype=dtype)
    matrix[3, 0, 2, 5] = bad
    with pytest.raises(ValueError, match="finite"):
        function(matrix)


@pytest.mark.parametrize("rank", [-1, 0, 7])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=rf"\[1, 6\] but got {rank}"):
        decompose(torch.ones(6, 9)).truncate(rank)


def fail_once(function, failures):
    """`function`, which does not converge the first time; every failure is noted."""

    def wrapper(*args, **kwargs):
        if not failures:
            failures.append(function.__name__)
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return function(*args, **kwargs)

    return wrapper


def fail(*args, **kwargs):
    raise torch.linalg.LinAlgError("The algorithm failed to converge")


@pytest.mark.parametrize("name", ["square", "tall", "wide", "column", "rank_3", "repeated", "huge", "batch"])
@pytest.mark.parametrize("broken_svd", [False, True], ids=["eigh_fails", "svd_fails_once_too"])
@each_dtype
def test_fallbacks(name, dtype, broken_svd, monkeypatch):
    svd, svd_failures, eigh_failures = torch.linalg.svd, [], []
    for name_of in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name_of, lambda *args, **options: eigh_failures.append(1) or fail())
    checks = test_residual_is_optimal, test_energies, test_vectors, test_leading_vectors, test_factors_are_balanced
    for check in checks:
        if broken_svd:
            svd_failures.clear()
            monkeypatch.setattr(torch.linalg, "svd", fail_once(svd, svd_failures))
        check(name, dtype)
        assert bool(svd_failures) == broken_svd
    assert bool(eigh_failures) == (dtype == torch.float32)


@each_dtype
def test_one_decomposition_gives_the_spectrum_and_every_truncation(dtype, monkeypatch):
    matrix = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls = []
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, own=original, **options: calls.append(1) or own(*args, **options)
        )
    system = decompose(matrix)
    tails, factors = system.tails, {rank: system.truncate(rank) for rank in (7, 9, 300)}
    assert len(calls) == 1
    decompose(matrix)  # nothing is kept anywhere else
    assert len(calls) == 2
    left, singular, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = [(singular[rank:] ** 2).sum() for rank in range(301)]
    np.testing.assert_allclose(tails.numpy(), expected, atol=1e-9 * expected[0])
    for rank, (a, b) in factors.items():
        best = (left[:, :rank] * singular[:rank]) @ right[:rank]
        np.testing.assert_allclose((a @ b).numpy(), best, atol=1e-9 * singular[0])


@pytest.mark.parametrize("shape", [(160, 12), (12, 160), (3, 90, 7)], ids=str)
def test_only_the_short_side_is_diagonalized(shape, monkeypatch):
    """And its spectrum, its leading subspaces and their projections are numpy's in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(gram.shape[-1]) or eigh(gram))
    short, exact = min(shape[-2:]), matrix.double().numpy()
    energies, vectors = left_system(matrix)
    left, singular, right = np.linalg.svd(exact, full_matrices=False)
    np.testing.assert_allclose(energies.numpy(), singular**2, rtol=1e-6)
    for rank in (1, short // 2, short):
        best = (left[..., :rank] * singular[..., None, :rank]) @ right[..., :rank, :]
        for basis in (vectors[..., :rank].numpy(), leading_vectors(matrix, rank).numpy()):
            projected = basis @ np.swapaxes(basis, -2, -1) @ exact
            assert np.linalg.norm(projected - best) <= 1e-6 * np.linalg.norm(exact)
    assert set(sizes) == {short}


def test_squared_norm():
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    assert squared_norm(weight) == pytest.approx(float(weight.double().square().sum()), rel=1e-7)
