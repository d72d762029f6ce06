"""The largest ranks that a rule may choose: R_k in equation 1 of Idelbayev & Carreira-Perpinan (CVPR 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from lowrank_pl.checks import check_int
from lowrank_pl.ranks.base import RankProblem

Caps: TypeAlias = int | Mapping[str, int] | tuple[tuple[str, int], ...] | None


def check_caps(most: Any) -> Caps:
    """The argument `most` of a rule: None, an int, or pairs `(pattern, int)` from a mapping, which can be hashed.

    Raises `ValueError` for a cap that is no int of at least 1.
    """
    pairs = tuple(most.items()) if isinstance(most, Mapping) else most
    several = type(pairs) is tuple and pairs and all(type(pair) is tuple and len(pair) == 2 for pair in pairs)
    caps: Iterable[Any] = [cap for _, cap in pairs] if several else [] if pairs is None else [pairs]
    for cap in caps:
        check_int("most", cap, 1)
    return pairs


def check_patterns_of_caps(problems: Sequence[RankProblem], most: Caps) -> None:
    """Raise `ValueError` for a pattern that matches none of the layers; without layers there is nothing to match."""
    names = [problem.name for problem in problems]
    for pattern, _ in most if names and isinstance(most, tuple) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"Pattern {pattern!r} in `most` matches none of the layers: {', '.join(names[:6])}, ...")


def cap_of(name: str, most: Caps) -> int | None:
    """The cap of one layer: that of the first pattern which matches its name."""
    if not isinstance(most, tuple):
        return most if isinstance(most, int) else None
    return next((cap for pattern, cap in most if fnmatchcase(name, pattern)), None)
