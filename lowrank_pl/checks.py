"""Checks of arguments, so that all say alike what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def check_int(name: str, value: Any, least: int, what: str = "int") -> None:
    """Raise `ValueError` for anything but an int of at least `least`."""
    if type(value) is not int or value < least:
        article = "an" if what[0] in "aeiou" else "a"
        raise ValueError(f"Expected argument `{name}` to be {article} {what} of at least {least} but got {value!r}")


def check_number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    """Raise `ValueError` for anything but an int or a float that fits; NaN fits nothing that is compared."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ValueError(f"Expected argument `{name}` to be {expected} but got {value!r}")


def check_among(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise `ValueError` for anything but one of these."""
    if not any(value is each or (isinstance(each, str) and value == each) for each in allowed):
        *first, last = map(repr, allowed)
        raise ValueError(f"Expected argument `{name}` to be {', '.join(first)} or {last} but got {value!r}")
