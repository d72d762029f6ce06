"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.precision import product_dtype
from lowrank_pl.linalg.svd import (
    SingularSystem,
    decompose,
    leading_vectors,
    left_system,
    singular_energies,
    squared_norm,
    tail_energies,
)
from lowrank_pl.linalg.tucker import tucker2, unfold

__all__ = [
    "SingularSystem",
    "decompose",
    "evb_rank",
    "leading_vectors",
    "left_system",
    "product_dtype",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "tucker2",
    "unfold",
]
