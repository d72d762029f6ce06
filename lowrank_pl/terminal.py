"""Where tables are printed."""

import sys

from rich.console import Console


def terminal() -> Console:
    """Standard output; 100 columns wide where that is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)


def printable(text: str) -> str:
    """Foreign text in one line: control characters, escapes of terminals and halves of characters are spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
