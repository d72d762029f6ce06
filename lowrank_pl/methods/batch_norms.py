"""Batch norms of a compressed network, re-estimated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_pl.methods.running import evaluated, seeded
from lowrank_pl.samples import Samples


@torch.no_grad()
def reestimate_batch_norms_(model: nn.Module, samples: Samples) -> None:
    """Running statistics of batch norms as plain averages over the batches of the samples, everything else unchanged.

    Batches want to be mixed: of those that are sorted by class the averages of variances are too small.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    handles = [norm.register_forward_pre_hook(_train_on_several) for norm in norms]
    try:
        with evaluated(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            for number, is_held, batch in samples.batches():
                if not is_held:
                    with seeded(model, number):
                        samples.run(model, batch)
    finally:
        for norm, momentum, old, handle in zip(norms, momenta, before, handles, strict=True):
            handle.remove()
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # it never ran
                for name, value in old.items():
                    norm.get_buffer(name).copy_(value)


def _train_on_several(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A single value per channel, of a last batch of one, has no variance: it is left out."""
    norm.train(args[0].numel() > args[0].shape[1])
