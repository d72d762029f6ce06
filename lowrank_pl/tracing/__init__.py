"""What a network does when it runs: listen to its layers, count, and keep what they were called with."""

from lowrank_pl.tracing.calls import SAMPLES, Call, count_inputs, with_inputs
from lowrank_pl.tracing.counter import FUSED
from lowrank_pl.tracing.following import Following, what_follows
from lowrank_pl.tracing.record import record, run
from lowrank_pl.tracing.recorder import Recorder, eager, slow_paths
from lowrank_pl.tracing.trace import NEVER_BUT_READ, READ, Trace

__all__ = [
    "FUSED", "NEVER_BUT_READ", "READ", "SAMPLES", "Call", "Following", "Recorder", "Trace", "count_inputs", "eager",
    "record", "run", "slow_paths", "what_follows", "with_inputs",
]  # fmt: skip
