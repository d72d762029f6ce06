"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.cp import Terms, cp_als, expand
from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.low_rank_sparse import Alternation, Quadratic, godec, grebdec, prune
from lowrank_pl.linalg.precision import product_dtype
from lowrank_pl.linalg.proximal import column_norms, shrink_columns, shrink_singular_values
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
    "Alternation",
    "Quadratic",
    "Root",
    "SingularSystem",
    "Terms",
    "check_finite",
    "column_norms",
    "cp_als",
    "decompose",
    "evb_rank",
    "expand",
    "godec",
    "grebdec",
    "leading_vectors",
    "left_system",
    "product_dtype",
    "prune",
    "regress",
    "shrink_columns",
    "shrink_singular_values",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "tt_svd",
    "tt_tails",
    "tucker2",
    "unfold",
]
