"""What weights are written as and deployed as, one file for each kind."""

from functools import partial
from typing import Any

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.structures.base import Layout, Rank, Structure, in_type, total_macs
from lowrank_pl.structures.chain import Chain
from lowrank_pl.structures.constant import Constant
from lowrank_pl.structures.dense import Dense
from lowrank_pl.structures.some_channels import SomeChannels
from lowrank_pl.structures.sparse import Sparse
from lowrank_pl.structures.sum import Sum
from lowrank_pl.structures.sweeps import sweep
from lowrank_pl.structures.tensor_train import Cores
from lowrank_pl.structures.tiles import Tiles
from lowrank_pl.structures.two_forms import TwoForms

__all__ = [
    "Chain",
    "Constant",
    "Cores",
    "Dense",
    "Layout",
    "Rank",
    "SomeChannels",
    "Sparse",
    "Structure",
    "Sum",
    "Tiles",
    "TwoForms",
    "in_type",
    "layout_from_dict",
    "sweep",
    "total_macs",
]


def layout_from_dict(values: Any, layer: LayerSpec) -> Layout:
    """What `Layout.to_dict` described, in place of `layer`, whose inputs flow through it.

    Raises `ValueError` for anything else, and for a layout that does not fit the layer.
    """
    readers = [kind.from_dict for kind in (Chain, Tiles, Cores, Constant, Dense, Sparse)]
    nested = [partial(kind.from_dict, read=layout_from_dict) for kind in (Sum, SomeChannels)]
    for read in (*readers, *nested):
        layout = read(values, layer) if isinstance(values, dict) else None
        if layout is not None:
            return layout
    raise ValueError(
        "Expected a chain, tiles, a tensor train, a constant, a dense or sparse layer, a sum or some channels in place "
        f"of {layer} but got {values!r:.200}"
    )
