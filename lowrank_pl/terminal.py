"""Where tables are printed."""

import sys

from rich.console import Console


def terminal() -> Console:
    """Standard output; 100 columns wide where that is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
