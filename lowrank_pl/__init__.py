"""Low-rank compression of neural networks while they train, as PyTorch Lightning callbacks.

Names are imported when first used, so that the command line starts without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; below the same by name
    from lowrank_pl.adapters import Adapter, Experts, LinearMap, ReshapedParameters, register_adapter
    from lowrank_pl.callbacks import (
        ADMM,
        DeepTwist,
        ExtractStructure,
        LearningCompression,
        LStep,
        MuSchedule,
        TrainingMetric,
    )
    from lowrank_pl.costs import Latency, Macs, Params
    from lowrank_pl.decompositions import (
        CP,
        SVD,
        BlockSVD,
        Cheapest,
        FirstOf,
        LowRankPlusColumns,
        LowRankPlusSparse,
        SeparableSVD,
        SpatialSVD,
        TensorTrain,
        TiledSVD,
        Tucker2,
    )
    from lowrank_pl.deployment import deploy
    from lowrank_pl.layer_spec import LayerSpec
    from lowrank_pl.norms import fold_norms_
    from lowrank_pl.one_shot import compress, from_scratch
    from lowrank_pl.planning import make_plan
    from lowrank_pl.ranks import (
        EVBMF,
        ADMMRanks,
        CompressionRatio,
        CostBudget,
        CostPenalty,
        EnergyThreshold,
        FixedRank,
        GreedyEnergy,
        MultipleOf,
        RankFraction,
    )
    from lowrank_pl.report import Report, summarize
    from lowrank_pl.samples import Samples
    from lowrank_pl.storage import load_compressed, save_compressed
    from lowrank_pl.targets import Targets
    from lowrank_pl.tracing import Call

_HOMES = {
    "lowrank_pl.adapters": ("Adapter", "Experts", "LinearMap", "ReshapedParameters", "register_adapter"),
    "lowrank_pl.callbacks": (
        "ADMM",
        "DeepTwist",
        "ExtractStructure",
        "LearningCompression",
        "LStep",
        "MuSchedule",
        "TrainingMetric",
    ),
    "lowrank_pl.planning": ("make_plan",),
    "lowrank_pl.one_shot": ("compress", "from_scratch"),
    "lowrank_pl.samples": ("Samples",),
    "lowrank_pl.deployment": ("deploy",),
    "lowrank_pl.layer_spec": ("LayerSpec",),
    "lowrank_pl.norms": ("fold_norms_",),
    "lowrank_pl.storage": ("load_compressed", "save_compressed"),
    "lowrank_pl.report": ("Report", "summarize"),
    "lowrank_pl.decompositions": (
        "CP",
        "SVD",
        "BlockSVD",
        "Cheapest",
        "FirstOf",
        "LowRankPlusColumns",
        "LowRankPlusSparse",
        "SeparableSVD",
        "SpatialSVD",
        "TensorTrain",
        "TiledSVD",
        "Tucker2",
    ),
    "lowrank_pl.ranks": (
        "EVBMF",
        "ADMMRanks",
        "CompressionRatio",
        "CostBudget",
        "CostPenalty",
        "EnergyThreshold",
        "FixedRank",
        "GreedyEnergy",
        "MultipleOf",
        "RankFraction",
    ),
    "lowrank_pl.costs": ("Latency", "Macs", "Params"),
    "lowrank_pl.targets": ("Targets",),
    "lowrank_pl.tracing": ("Call",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.2.0"
__all__ = [
    "ADMM",
    "CP",
    "EVBMF",
    "SVD",
    "ADMMRanks",
    "Adapter",
    "BlockSVD",
    "Call",
    "Cheapest",
    "CompressionRatio",
    "CostBudget",
    "CostPenalty",
    "DeepTwist",
    "EnergyThreshold",
    "Experts",
    "ExtractStructure",
    "FirstOf",
    "FixedRank",
    "GreedyEnergy",
    "LStep",
    "Latency",
    "LayerSpec",
    "LearningCompression",
    "LinearMap",
    "LowRankPlusColumns",
    "LowRankPlusSparse",
    "Macs",
    "MuSchedule",
    "MultipleOf",
    "Params",
    "RankFraction",
    "Report",
    "ReshapedParameters",
    "Samples",
    "SeparableSVD",
    "SpatialSVD",
    "Targets",
    "TensorTrain",
    "TiledSVD",
    "TrainingMetric",
    "Tucker2",
    "__version__",
    "compress",
    "deploy",
    "fold_norms_",
    "from_scratch",
    "load_compressed",
    "make_plan",
    "register_adapter",
    "save_compressed",
    "summarize",
]


if not TYPE_CHECKING:  # which would take every name for one of this package's

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'lowrank_pl' has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
