"""What the commands that train have in common."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lowrank_pl.runs import Interrupted, Stop

# What a user can mend, and is told in a few lines without a trace: while a run is built, and while it is trained, where
# other errors are more likely those of a program.
WHILE_BUILDING = (ValueError, TypeError, OSError, RuntimeError, ImportError, InstantiationException,
                  OmegaConfBaseException)  # fmt: skip
WHILE_TRAINING = (ValueError, OSError, MisconfigurationException)


@contextmanager
def session() -> Iterator[Stop]:
    """Quiet libraries; a signal ends the command at the next step that can be taken up again, with the shell's usual
    exit code for it."""
    quiet()
    stop = Stop()
    try:
        yield stop
    except Interrupted:
        assert stop.signal is not None
        sys.stderr.write("Interrupted; `lowrank-pl resume` with the run's directory goes on with it.\n")
        sys.exit(128 + stop.signal)


def quiet() -> None:
    """Libraries say what matters."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning with a newer PyTorch


def in_words(error: BaseException) -> str:
    """The message in one line; of a configured object that could not be made, its own, with the key."""
    message, key = str(error), getattr(error, "full_key", None)
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        message = f"`{message.rpartition('full_key: ')[2]}`: {error.__cause__}"
    elif isinstance(error, OmegaConfBaseException) and key:
        message = f"`{key}`: {message.splitlines()[0]}"
    return " ".join(message.split())
