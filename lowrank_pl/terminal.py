"""Where tables and lines are printed."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def terminal() -> Console:
    """Standard output; 100 columns wide where that is no terminal. `:name:` in a path is no emoji."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, emoji=False)


def progress(items: Iterable[T], words: str, total: int | None = None) -> Iterable[T]:
    """The same items, with a bar in a terminal."""
    console = terminal()
    return track(items, words, total, console=console, transient=True, disable=not console.is_terminal)


def printable(text: str) -> str:
    """Text from elsewhere in one line: control characters and halves of characters are spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Print a line as it is. Rich would take `[...]` and `:name:` in a path for markup."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
