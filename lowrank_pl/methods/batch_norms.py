"""Batch norms of a compressed network, re-estimated."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_pl.methods.running import evaluated, seeded
from lowrank_pl.samples import Samples


@torch.no_grad()
def reestimate_batch_norms_(model: nn.Module, samples: Samples) -> None:
    """Running statistics of batch norms as plain averages over the samples, everything else unchanged."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        with evaluated(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for number, is_held, batch in samples.batches():
                if not is_held:
                    with seeded(model, number):
                        samples.run(model, batch)
    finally:
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # it never ran
                for name, value in old.items():
                    norm.get_buffer(name).copy_(value)
