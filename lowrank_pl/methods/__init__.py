"""Ways of getting a network to live in a structure, without a trainer."""

from lowrank_pl.methods.admm import Splits, SplitStep, add_split_gradients_, choices_of, deployed, split_step
from lowrank_pl.methods.deeptwist import Distortion, distort_, is_due
from lowrank_pl.methods.lc_thresholds import least_lambda, least_mu
from lowrank_pl.methods.learning_compression import CStep, LCState, add_penalty_gradients_, c_step
from lowrank_pl.methods.running_moments import RunningMoments

__all__ = [
    "CStep",
    "Distortion",
    "LCState",
    "RunningMoments",
    "SplitStep",
    "Splits",
    "add_penalty_gradients_",
    "add_split_gradients_",
    "c_step",
    "choices_of",
    "deployed",
    "distort_",
    "is_due",
    "least_lambda",
    "least_mu",
    "split_step",
]
