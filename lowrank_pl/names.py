"""Strings and mappings from names where a choice is expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from inspect import isabstract
from typing import Any, TypeVar

T = TypeVar("T")


def resolve(choice: Any, base: type[T], argument: str, several: Callable[..., T] | None = None) -> dict[str, T]:
    """A choice as `{pattern: object}`: from an object of type `base`, the snake-case name of one of its subclasses
    that needs no arguments, or a mapping from name patterns to either; from a list or a tuple by `several(*list)`, if
    that is given.

    Raises `ValueError` for an unknown name and `TypeError` for anything else.
    """
    if isinstance(choice, Mapping):
        if not choice:
            raise ValueError(f"Expected argument `{argument}` to map patterns to choices but got an empty mapping")
        return {str(pattern): _one(value, base, argument, several) for pattern, value in choice.items()}
    return {"*": _one(choice, base, argument, several)}


def _one(choice: Any, base: type[T], argument: str, several: Callable[..., T] | None) -> T:
    if isinstance(choice, base):
        return choice
    if several is not None and isinstance(choice, (list, tuple)):
        return several(*choice)
    known = kinds_of(base)
    if not isinstance(choice, str):
        raise TypeError(
            f"Expected argument `{argument}` to be a {base.__name__} (or a mapping of name patterns to them), such as "
            f"{', '.join(kind.__name__ for kind in known.values())}, but got {choice!r}"
        )
    if choice not in known:
        raise ValueError(f"Unknown `{argument}` {choice!r}; known are {', '.join(sorted(known))}")
    try:
        return known[choice]()
    except TypeError as error:
        raise ValueError(f"`{argument}` {choice!r} needs arguments: use {known[choice].__name__}(...)") from error


def kinds_of(base: type[T]) -> dict[str, type[T]]:
    """The subclasses that are not abstract, by their snake-case names."""
    return {snake_case(kind.__name__): kind for kind in _finals(base)}


def _finals(base: type[T]) -> Iterator[type[T]]:
    for kind in base.__subclasses__():
        if not isabstract(kind):
            yield kind
        yield from _finals(kind)


def snake_case(name: str) -> str:
    """`TiledSVD` to `tiled_svd`, `SVD` to `svd`, `Tucker2` to `tucker2`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def same_words(text: str) -> str:
    """A `repr` without addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def clean_name(name: str) -> str:
    """A module's dotted name without what `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def under(part: str, named: Mapping[str, T]) -> dict[str, T]:
    """What belongs to a part, under the part's own names."""
    inside = {name: value for name, value in named.items() if not part or f"{name}.".startswith(f"{part}.")}
    return {name[len(part) :].lstrip("."): value for name, value in inside.items()}
