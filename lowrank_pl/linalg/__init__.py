"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.precision import product_dtype
from lowrank_pl.linalg.proximal import column_norms, shrink_columns, shrink_singular_values
from lowrank_pl.linalg.regression import regress
from lowrank_pl.linalg.root import Root
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
    "Root",
    "SingularSystem",
    "column_norms",
    "decompose",
    "evb_rank",
    "leading_vectors",
    "left_system",
    "product_dtype",
    "regress",
    "shrink_columns",
    "shrink_singular_values",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "tucker2",
    "unfold",
]
