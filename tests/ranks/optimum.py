"""The best choice of one entry per layer within a budget, exactly: what the rules are measured against."""

import numpy as np


def least_loss(tables, budget):
    """`tables` holds `(costs, losses)` per layer. All sums of the layers so far that no other beats in both."""
    costs, losses = np.zeros(1), np.zeros(1)
    for more_costs, more_losses in tables:
        together = np.add.outer(costs, np.asarray(more_costs, float)).ravel()
        lost = np.add.outer(losses, np.asarray(more_losses, float)).ravel()
        together, lost = together[together <= budget], lost[together <= budget]
        order = np.lexsort((lost, together))
        together, lost = together[order], lost[order]
        kept = np.diff(np.minimum.accumulate(lost), prepend=np.inf) < 0
        costs, losses = together[kept], lost[kept]
    return losses[-1]
