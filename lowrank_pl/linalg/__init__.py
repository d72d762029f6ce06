"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.cp import Terms, cp_als, expand
from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.precision import product_dtype
from lowrank_pl.linalg.regression import regress
from lowrank_pl.linalg.root import Root
from lowrank_pl.linalg.svd import (
    SingularSystem,
    check_finite,
    decompose,
    leading_vectors,
    left_system,
    singular_energies,
    squared_norm,
    tail_energies,
)
from lowrank_pl.linalg.tensor_train import tt_svd, tt_tails
from lowrank_pl.linalg.tucker import tucker2, unfold

__all__ = [
    "Root",
    "SingularSystem",
    "Terms",
    "check_finite",
    "cp_als",
    "decompose",
    "evb_rank",
    "expand",
    "leading_vectors",
    "left_system",
    "product_dtype",
    "regress",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "tt_svd",
    "tt_tails",
    "tucker2",
    "unfold",
]
