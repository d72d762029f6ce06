"""Matrices and tensors in, matrices and tensors out."""

from lowrank_pl.linalg.evbmf import evb_rank
from lowrank_pl.linalg.low_rank_sparse import Alternation, Quadratic, godec, grebdec, prune
from lowrank_pl.linalg.precision import product_dtype
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
    "Alternation",
    "Quadratic",
    "Root",
    "SingularSystem",
    "decompose",
    "evb_rank",
    "godec",
    "grebdec",
    "leading_vectors",
    "left_system",
    "product_dtype",
    "prune",
    "regress",
    "singular_energies",
    "squared_norm",
    "tail_energies",
    "tucker2",
    "unfold",
]
