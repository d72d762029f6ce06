"""Where tables and lines are printed."""

import sys

from rich.console import Console


def terminal() -> Console:
    """Standard output; 100 columns wide where that is no terminal. `:name:` in a path is no emoji."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, emoji=False)


def printable(text: str) -> str:
    """A line of text from elsewhere, such as a path: what would move a terminal's cursor is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say(line: str) -> None:
    """Print a line as it is. Rich would take `[...]` and `:name:` in a path for markup."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()
