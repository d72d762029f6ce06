"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.precision import product_dtype
from lowrank_pl.linalg.svd import (
    leading_vectors,
    shared_decompositions,
    singular_energies,
    squared_norm,
    tail_energies,
    truncated_svd,
)
from lowrank_pl.linalg.tucker import tucker2, unfold

__all__ = [
    "evb_rank",
    "leading_vectors",
    "product_dtype",
    "shared_decompositions",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "truncated_svd",
    "tucker2",
    "unfold",
]
