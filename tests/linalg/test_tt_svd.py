"""Tensor trains against tensorly, numpy and the bound of Oseledets (2011)."""

import math
from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch

from lowrank_pl.linalg import tt_svd, tt_tails

TENSORS = [
    ((3, 4, 5), (2, 3)), ((3, 4, 5), (3, 5)), ((6, 6), (4,)), ((2, 3, 4, 5), (2, 5, 3)), ((7, 2, 7), (5, 6)),
    ((4, 4, 4, 4), (4, 7, 4)), ((1, 6, 5), (1, 4)), ((8, 3, 1), (3, 1)), ((2, 2, 2, 2, 2, 2), (2, 3, 4, 3, 2)),
    ((12, 15, 10), (6, 6)),
]  # fmt: skip
each_tensor = pytest.mark.parametrize(("sizes", "ranks"), TENSORS, ids=str)


def make(sizes, dtype=torch.float64):
    """With unfoldings whose singular values fall."""
    generator = torch.Generator().manual_seed(sum(sizes))
    tensor = torch.randn(sizes, generator=generator, dtype=torch.float64)
    for axis, size in enumerate(sizes):
        falling = torch.arange(1, size + 1, dtype=torch.float64).pow(-0.5)
        tensor = tensor * falling.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    return tensor.to(dtype)


def product(cores):
    """Entry by entry, as the product of matrices."""
    sizes = [core.shape[1] for core in cores]
    found = np.empty(sizes)
    for index in np.ndindex(*sizes):
        matrix = np.eye(1)
        for core, i in zip(cores, index, strict=True):
            matrix = matrix @ core[:, i].double().numpy()
        found[index] = matrix.item()
    return found


@each_tensor
def test_no_worse_than_tensorly(sizes, ranks):
    tensor = make(sizes)
    cores = tt_svd(tensor, ranks)
    assert [tuple(core.shape) for core in cores] == list(zip((1, *ranks), sizes, (*ranks, 1), strict=True))
    theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(tensorly.tensor(tensor.numpy()), [1, *ranks, 1]))
    errors = [np.linalg.norm(each - tensor.numpy()) for each in (product(cores), theirs)]
    assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-13


@each_tensor
def test_tails_bound_the_error(sizes, ranks):
    tensor = make(sizes)
    tails = tt_tails(tensor)
    for k, tail in enumerate(tails, 1):
        singular = np.linalg.svd(tensor.numpy().reshape(math.prod(sizes[:k]), -1), compute_uv=False)
        expected = [np.square(singular[r:]).sum() for r in range(len(singular) + 1)]
        np.testing.assert_allclose(tail.numpy(), expected, rtol=1e-9, atol=1e-12)
    error = np.square(product(tt_svd(tensor, ranks)) - tensor.numpy()).sum()
    lost = [float(tail[r]) for tail, r in zip(tails, ranks, strict=True)]
    assert max(lost) - 1e-12 <= error <= sum(lost) + 1e-12


@each_tensor
def test_float32_is_as_near(sizes, ranks):
    exact = make(sizes, torch.float32).double()
    errors = [np.linalg.norm(product(tt_svd(x, ranks)) - exact.numpy()) for x in (exact.float(), exact)]
    assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-5 * float(exact.norm())


def test_cores_are_balanced():
    """No core takes all of the size, however large the tensor is."""
    tensor = 1e6 * make((4, 4, 4, 4))
    cores = tt_svd(tensor, (4, 7, 4))
    norms = [float(core.norm()) for core in cores]
    assert max(norms) < (1 + 1e-9) * min(norms)
    for core, other in pairwise(cores):  # and no number of a bond is large on one side of it alone
        sides = core.square().sum((0, 1)) / other.square().sum((1, 2))
        assert float(sides.max()) < 100 * float(sides.min())
