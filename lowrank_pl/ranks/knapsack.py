"""One choice per layer within a budget: the multiple-choice knapsack problem."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# What is better by a smaller share of the loss is not looked for
TOLERANCE = 1e-3
# Partial choices looked at per layer, and in all: some tenths of a second
PAIRS_PER_LAYER, PAIRS = 20_000, 1_000_000


def spent(costs: Sequence[Array], places: Sequence[int]) -> float:
    """What the choices cost together. `costs[k][i]` is what choice i of layer k costs."""
    return float(sum(each[i] for each, i in zip(costs, places, strict=True)))


def fill(costs: Sequence[Array], losses: Sequence[Array], places: Sequence[int], budget: float) -> list[int]:
    """Spend what is left: raise one choice after another, the one with the most loss saved per cost first, while one
    can be raised."""
    chosen = list(places)

    def offer(k: int) -> tuple[float, int, int] | None:
        """The best move of layer k that fits."""
        saved, more = losses[k][chosen[k]] - losses[k], costs[k] - costs[k][chosen[k]]
        possible = np.flatnonzero((more > 0) & (more <= rest) & (saved > 0))
        if not len(possible):
            return None
        gains = saved[possible] / more[possible]
        return -float(gains.max()), k, int(possible[gains.argmax()])

    rest = budget - spent(costs, chosen)
    queue = [move for k in range(len(costs)) if (move := offer(k))]
    heapq.heapify(queue)
    while queue:
        move = heapq.heappop(queue)
        _, k, place = move
        now = offer(k)  # less is left than when the move was offered, so that it is at most as good
        if now == move:
            chosen[k] = place
            rest = budget - spent(costs, chosen)
            now = offer(k)
        if now:
            heapq.heappush(queue, now)
    return chosen


def improve(
    costs: Sequence[Array], losses: Sequence[Array], places: Sequence[int], budget: float, price: float
) -> list[int]:
    """Choices with less loss than `places` within the budget, or `places` where there are none or too little is to be
    won.

    `price` is the loss per cost whose choices, each layer's least `loss + price * cost`, about meet the budget. Their
    sum less `price * budget` is a bound that no choices within the budget beat (Lagrangian duality); each choice raises
    it by what its own `loss + price * cost` is above its layer's least. So only choices that do not raise it above the
    loss at hand can take part, usually few, and these are tried together: layer by layer the partial choices that no
    other beats in both cost and loss. The result is exact to `TOLERANCE` unless these become too many; then the ones
    with the least bound are followed.
    """
    value = spent(losses, places)
    totals = [loss + price * cost for cost, loss in zip(costs, losses, strict=True)]
    least = [float(total.min()) for total in totals]
    goal = value * (1 - TOLERANCE)
    slack = goal - (sum(least) - price * budget)
    if value <= 0 or slack <= 0:
        return list(places)
    items = [
        _frontier(cost, loss, np.flatnonzero(total - low <= slack))
        for cost, loss, total, low in zip(costs, losses, totals, least, strict=True)
    ]
    open_layers = sum(len(each) > 1 for each in items)
    pairs = max(PAIRS_PER_LAYER, PAIRS // max(open_layers, 1))
    # what the layers still to come cost and raise the bound by at least
    following = np.cumsum([cost[each].min() for cost, each in zip(costs, items, strict=True)][::-1])[::-1]
    cost, loss, bound = np.zeros(1), np.zeros(1), 0.0
    steps: list[tuple[Array, Array]] = []
    for k, each in enumerate(items):
        bound += least[k]
        rest = following[k + 1] if k + 1 < len(items) else 0.0
        together = np.add.outer(cost, costs[k][each]).ravel()
        lost = np.add.outer(loss, losses[k][each]).ravel()
        possible = np.flatnonzero((together + rest <= budget) & (lost + price * together - bound <= slack))
        kept = _frontier(together, lost, possible)
        most = max(pairs // (len(items[k + 1]) if k + 1 < len(items) else 1), 1)
        if len(kept) > most:
            raised = lost[kept] + price * together[kept]
            kept = kept[np.sort(np.argpartition(raised, most)[:most])]
        steps.append((kept // len(each), each[kept % len(each)]))
        cost, loss = together[kept], lost[kept]
    if not len(cost) or loss[-1] >= goal:
        return list(places)
    found, i = [], len(cost) - 1
    for parents, choices in reversed(steps):
        found.append(int(choices[i]))
        i = int(parents[i])
    found.reverse()
    return found if spent(costs, found) <= budget else list(places)


def _frontier(costs: Array, losses: Array, among: Array) -> Array:
    """Those that nothing of the same or a lower cost beats in loss, by growing cost and falling loss."""
    order = among[np.lexsort((losses[among], costs[among]))]
    best = np.minimum.accumulate(losses[order])
    return order[np.diff(best, prepend=np.inf) < 0]
