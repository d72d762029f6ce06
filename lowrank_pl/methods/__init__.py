"""Ways of getting a network to live in a structure, without a trainer."""

from lowrank_pl.methods.deeptwist import Distortion, distort_, is_due

__all__ = ["Distortion", "distort_", "is_due"]
