"""Several decompositions for a layer: what choices among them share."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_pl.decompositions.base import Candidates, Decomposition
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.names import resolve


@dataclass(frozen=True, init=False)
class Several(Candidates):
    """Made of decompositions and of their snake-case names.

    Raises `TypeError` without any, and for what is neither; `ValueError` for an unknown name.
    """

    members: tuple[Decomposition, ...]

    def __init__(self, *members: str | Decomposition) -> None:
        if not members:
            name = type(self).__name__
            raise TypeError(f'Expected structures to choose among, such as {name}("tucker2", "svd"), but got none')
        each = [resolve(member, Decomposition, "method")["*"] for member in members]  # type: ignore[type-abstract]
        object.__setattr__(self, "members", tuple(each))

    def by_stages(self) -> Several:
        return type(self)(*(member.by_stages() for member in self.members))

    def unsupported(self, layer: LayerSpec) -> str | None:
        reasons = [(type(member).__name__, member.unsupported(layer)) for member in self.members]
        if any(reason is None for _, reason in reasons):
            return None
        return ", ".join(dict.fromkeys(f"{name} {reason}" for name, reason in reasons))
