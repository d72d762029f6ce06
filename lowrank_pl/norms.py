"""Batch norms between the factors of convolutions, for training from scratch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from lowrank_pl.extraction import RECORD
from lowrank_pl.layers import FactorChain


def insert_norms_(net: nn.Module, names: Collection[str]) -> None:
    """Put batch norms between the factors of the named layers, as far as they are convolutions.

    Raises `ValueError` where none is.
    """
    found = [(chain, entry) for name, chain, entry in _chains(net) if name in names and chain.layout.layer.kernel]
    if not found:
        raise ValueError("Expected no argument `norm_between`: no convolution has become a chain of factors")
    for chain, entry in found:
        chain.insert_norms_()
        entry["structure"] = chain.layout.to_dict()


def fold_norms_(net: nn.Module) -> None:
    """Turn the batch norms that `from_scratch(..., norm_between=True)` has put between factors into scales and biases
    of the layers before them, once the network is trained: in evaluation mode it then computes the same without them.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"Expected argument `net` to be a module but got {net!r:.100}")
    for _, chain, entry in _chains(net):
        if chain.layout.between == "norms":
            chain.fold_norms_()
        entry["structure"] = chain.layout.to_dict()


def _chains(net: nn.Module) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every chain of factors with its entries in the records of what was compressed."""
    for owner in net.modules():
        for name, entry in getattr(owner, RECORD, {"layers": {}})["layers"].items():
            module = owner.get_submodule(name)
            if isinstance(module, FactorChain):
                yield name, module, entry
