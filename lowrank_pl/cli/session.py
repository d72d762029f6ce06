"""What the commands that train have in common."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lowrank_pl.runs import Interrupted, Stop


@contextmanager
def session() -> Iterator[Stop]:
    """Quiet libraries; a signal ends the command at the next step that can be taken up again, with the shell's usual
    exit code for it."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning with a newer PyTorch
    stop = Stop()
    try:
        yield stop
    except Interrupted:
        assert stop.signal is not None
        sys.stderr.write("Interrupted; `lowrank-pl resume` with the run's directory goes on with it.\n")
        sys.exit(128 + stop.signal)
