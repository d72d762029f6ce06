"""Lightning callbacks."""

from lowrank_pl.callbacks.admm import ADMM
from lowrank_pl.callbacks.alternating import AlternatingCallback
from lowrank_pl.callbacks.compression_callback import CompressionCallback
from lowrank_pl.callbacks.deeptwist import DeepTwist
from lowrank_pl.callbacks.extract_structure import ExtractStructure
from lowrank_pl.callbacks.lc_settings import LStep, MuSchedule
from lowrank_pl.callbacks.learning_compression import LearningCompression
from lowrank_pl.callbacks.training_metric import TrainingMetric

__all__ = [
    "ADMM",
    "AlternatingCallback",
    "CompressionCallback",
    "DeepTwist",
    "ExtractStructure",
    "LStep",
    "LearningCompression",
    "MuSchedule",
    "TrainingMetric",
]
