"""The largest ranks that a rule may choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from lowrank_pl.ranks.base import RankProblem


def check_caps(most: Any) -> Any:
    """The argument `most` of a rule: None, an int, or pairs `(pattern, int)` from a mapping.

    Raises `ValueError` for a cap that is no int of at least 1.
    """
    if most is None:
        return None
    pairs = tuple(most.items()) if isinstance(most, Mapping) else most
    if type(pairs) is tuple and pairs and all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
        caps: Iterable[Any] = [cap for _, cap in pairs]
    else:
        caps = [pairs]
    if not all(type(cap) is int and cap >= 1 for cap in caps):
        raise ValueError(
            f"Expected argument `most` to be an int of at least 1, or a mapping from name patterns to such, but got "
            f"{most!r}"
        )
    return pairs


def capped(problems: Sequence[RankProblem], most: Any) -> list[RankProblem]:
    """The problems with their caps. Raises `ValueError` for a pattern that matches none of them."""
    if most is None:
        return list(problems)
    if problems and isinstance(most, tuple):
        names = [problem.name for problem in problems]
        for pattern, _ in most:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Pattern {pattern!r} in `most` matches none of the layers: {', '.join(names[:6])}, ..."
                )
    return [replace(problem, most=cap_of(problem.name, most)) for problem in problems]


def cap_of(name: str, most: Any) -> int | None:
    """The cap of one layer: that of the first pattern which matches its name."""
    if not isinstance(most, tuple):
        return most
    return next((cap for pattern, cap in most if fnmatchcase(name, pattern)), None)
