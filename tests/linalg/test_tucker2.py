"""HOOI against tensorly and planted ranks."""

from itertools import pairwise

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker

from lowrank_pl.linalg import leading_vectors, tucker2, unfold

tensorly.set_backend("numpy")

SHAPES = [(10, 8, 9), (5, 14, 1), (6, 3, 25), (16, 12, 4)]


def random_kernel(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted_kernel(shape, rank_in, rank_out, noise=0.0):
    """A kernel of Tucker-2 rank (rank_in, rank_out), plus noise."""
    core = random_kernel((rank_out, rank_in, shape[2]), 1)
    outer, inner = random_kernel((shape[0], rank_out), 2), random_kernel((shape[1], rank_in), 3)
    exact = torch.einsum("tb,bak,sa->tsk", outer, core, inner)
    return exact / exact.norm() + noise * random_kernel(shape, 4)


def starts(kernel, rank_in, rank_out):
    """The truncated higher-order SVD."""
    return leading_vectors(unfold(kernel, 1), rank_in), leading_vectors(unfold(kernel, 0), rank_out)


def hooi(kernel, rank_in, rank_out, **options):
    return tucker2(kernel, *starts(kernel, rank_in, rank_out), **options)


def compose(outer, core, inner):
    return torch.einsum("tb,bak,as->tsk", outer, core, inner)


def kept(kernel, factors):
    """The share of the energy that the approximation keeps."""
    kernel = kernel.double()
    return 1 - float((kernel - compose(*factors)).square().sum() / kernel.square().sum())


def ranks_to_try(shape):
    return [(1, 1), (2, 3), (3, 2), (min(shape[1], 5), 4)]


def reference(kernel, rank_in, rank_out):
    """The same share for tensorly's HOOI, run until it stands still."""
    (core, (outer, inner)), _ = partial_tucker(
        kernel.double().numpy(),
        rank=[rank_out, rank_in],
        modes=[0, 1],
        init="svd",
        n_iter_max=300,
        tol=1e-12,
    )
    return kept(kernel, (torch.tensor(outer), torch.tensor(core), torch.tensor(inner).T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("noise", [0.01, 0.03])
@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
def test_as_good_as_tensorly(shape, noise, dtype):
    kernel = planted_kernel(shape, 2, 3, noise).to(dtype)
    for rank_in, rank_out in ranks_to_try(shape):
        ours = kept(kernel, hooi(kernel, rank_in, rank_out))
        assert ours >= reference(kernel, rank_in, rank_out) - 1e-4, (rank_in, rank_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
def test_same_optimum_as_tensorly(shape):
    """A kernel without structure has several local optima: the order of the modes has to be tensorly's."""
    kernel = random_kernel(shape)
    for rank_in, rank_out in ranks_to_try(shape):
        swapped = hooi(kernel.transpose(0, 1), rank_out, rank_in, iterations=300, tolerance=1e-13)
        ours, theirs = kept(kernel.transpose(0, 1), swapped), reference(kernel, rank_in, rank_out)
        assert ours == pytest.approx(theirs, abs=1e-7), (rank_in, rank_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recovers_planted_ranks(shape, dtype):
    for rank_in, rank_out in [(1, 1), (2, 2), (3, 2), (3, shape[0])]:
        if rank_out > rank_in * shape[2] or rank_in > rank_out * shape[2]:
            continue  # there is no core of that rank
        kernel = planted_kernel(shape, rank_in, rank_out).to(dtype)
        factors = hooi(kernel, rank_in, rank_out)
        error = float((kernel - compose(*factors)).norm() / kernel.norm())
        assert error <= (1e-6 if dtype == torch.float32 else 1e-12), (rank_in, rank_out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_orthonormal_factors(shape):
    outer, core, inner = hooi(random_kernel(shape).float(), 3, 2)
    assert outer.dtype == core.dtype == inner.dtype == torch.float64
    assert (outer.shape, core.shape, inner.shape) == ((shape[0], 2), (2, 3, shape[2]), (3, shape[1]))
    torch.testing.assert_close(outer.T @ outer, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(inner @ inner.T, torch.eye(3, dtype=torch.float64))


def test_more_ranks_than_the_other_mode_has():
    """rank_in > rank_out K: the surplus directions cost nothing and break nothing."""
    kernel = random_kernel((6, 8, 2))
    for dtype in (torch.float32, torch.float64):
        outer, core, inner = hooi(kernel.to(dtype), 7, 2)
        assert (outer.shape, core.shape, inner.shape) == ((6, 2), (2, 7, 2), (7, 8))
        assert kept(kernel, (outer, core, inner)) >= kept(kernel, hooi(kernel.to(dtype), 4, 2)) - 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_iteration_keeps_more(dtype):
    kernel = random_kernel((16, 12, 9)).to(dtype)
    shares = [kept(kernel, hooi(kernel, 3, 2, iterations=n, tolerance=0.0)) for n in range(12)]
    assert all(after >= before - 1e-12 for before, after in pairwise(shares))
    assert shares[-1] > shares[0] + 1e-3  # the start alone is not the optimum


@pytest.mark.parametrize("shape", [(120, 24, 1), (24, 120, 1), (10, 90, 2), (90, 10, 2)], ids=str)
def test_long_kernels_as_in_float64(shape):
    """Expanding and narrowing `1 x 1` convolutions, whose long unfolding has a short side; one optimum, since singular
    values are well apart."""
    rows, columns, area = shape
    left, right = (torch.linalg.qr(random_kernel((n, 10, 1), n).squeeze(2))[0] for n in (rows, columns * area))
    kernel = (left * 0.7 ** torch.arange(10)) @ right.T
    kernel = kernel.reshape(shape).float()
    for rank_in, rank_out in [(3, 3), (6, 4), (8, 8)]:
        ours = compose(*hooi(kernel, rank_in, rank_out, iterations=300, tolerance=0.0))
        exact = compose(*hooi(kernel.double(), rank_in, rank_out, iterations=300, tolerance=0.0))
        assert float((ours - exact).norm()) <= 1e-6 * float(kernel.norm()), (rank_in, rank_out)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scales(scale):
    kernel = planted_kernel((6, 5, 9), 2, 3).float() * scale
    factors = hooi(kernel, 2, 3)
    assert all(torch.isfinite(factor).all() for factor in factors)
    assert float((kernel - compose(*factors)).norm()) <= 1e-6 * float(kernel.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad, dtype):
    kernel = random_kernel((6, 5, 9)).to(dtype)
    finite = starts(kernel, 2, 3)
    kernel[2, 3, 4] = bad
    with pytest.raises(ValueError, match="finite"):
        starts(kernel, 2, 3)
    with pytest.raises(ValueError, match="finite"):
        tucker2(kernel, *finite)


def test_unfold():
    kernel = random_kernel((4, 3, 2))
    for mode, length in ((0, 4), (1, 3)):
        for i in range(length):
            assert torch.equal(unfold(kernel, mode)[i], kernel.select(mode, i).flatten())
