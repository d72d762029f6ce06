"""What a layer costs: weights, multiply-adds, seconds on this device, or any function of its shape."""

from collections.abc import Callable

from lowrank_pl.costs.base import Cost, StructureCost, charge, price
from lowrank_pl.costs.counts import Macs, Params
from lowrank_pl.costs.latency import Latency
from lowrank_pl.names import snake_case

__all__ = ["Cost", "Latency", "Macs", "Params", "StructureCost", "charge", "price", "resolve_cost"]


def resolve_cost(cost: str | Cost, argument: str = "cost") -> Cost:
    """A cost from its name (`params`, `macs`, `latency`), or any function from a `LayerSpec` to a number."""
    known: dict[str, Callable[[], Cost]] = {snake_case(kind.__name__): kind for kind in (Params, Macs, Latency)}
    if isinstance(cost, str) and cost in known:
        return known[cost]()
    if isinstance(cost, str) or not callable(cost):
        raise ValueError(
            f"Expected argument `{argument}` to be one of {', '.join(sorted(known))}, or a function from a LayerSpec "
            f"to a number, but got {cost!r}"
        )
    return cost
