"""A run's directory, and what it says about the run."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from lowrank_pl.files import write_files
from lowrank_pl.run_files import as_json, lock, read_facts
from lowrank_pl.runs.stopping import Interrupted

_PACKAGES = ("lowrank_pl", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


@dataclass
class Run:
    """`config.yaml` (resolved), and `run.json`: command, seed, versions, status, stages that are done.

    From `start` or `open` on this process alone works in the directory, until it ends, whatever ends it.
    """

    directory: Path
    facts: dict[str, Any]
    _lock: IO[str] | None = field(default=None, repr=False)

    @classmethod
    def start(
        cls, directory: str | Path, config: str, overrides: list[str], seed: int, links: dict[str, str] | None = None
    ) -> Run:
        """Make the directory and write what is known before anything is run; `ValueError` where a run lies already.

        `links` says which values of the config repeat others: `{"data.seed": "seed"}`.
        """
        path = Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        held = lock(path)
        if (path / "run.json").is_file():
            raise ValueError(
                f"{path} holds a run already: go on with it by `lowrank-pl resume {shlex.quote(str(path))}`, or choose "
                "another `hydra.run.dir`"
            )
        facts = {
            "status": "running",
            "command": shlex.join(["lowrank-pl", "train", *overrides]),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "links": links or {},
            "done": [],
        }
        run = cls(path, facts, held)
        write_files({path / "config.yaml": config.encode(), path / "run.json": as_json(facts)})
        return run

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """A run that was started before. Raises `FileNotFoundError` where there is none, `RuntimeError` while another
        process works on it."""
        path = Path(directory).absolute()
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"no config.yaml in {path}: expected the directory of a run")
        held = lock(path)
        return cls(path, read_facts(path) or {"status": "running", "links": {}, "done": []}, held)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Whatever happens inside is written down as the run's status."""
        self.facts.pop("error", None)
        self.record(status="running")
        try:
            yield
        except (KeyboardInterrupt, SystemExit, Interrupted):
            self.record(status="interrupted")
            raise
        except BaseException as error:
            self.record(status="failed", error=str(error)[:1000] or type(error).__name__)
            raise
        self.record(status="finished")

    @contextmanager
    def changed(self, config: str, **facts: Any) -> Iterator[None]:
        """Inside, with another config and these facts; both are taken back if an error ends it before a stage is done
        or a checkpoint written, so that values with which nothing can be trained do not stay."""
        files = [self.directory / name for name in ("config.yaml", "run.json")]
        before = {path: path.read_bytes() for path in files if path.is_file()}
        self.record(**facts)
        write_files({files[0]: config.encode()})
        reached = self._reached()
        try:
            yield
        except Interrupted:
            raise
        except Exception:
            if self._reached() == reached:
                write_files(before)
            raise

    def _reached(self) -> tuple[list[str], set[Path]]:
        return self.facts["done"], set(self.directory.glob("**/*.ckpt"))

    def record(self, **facts: Any) -> None:
        """Add to what `run.json` says."""
        self.facts |= facts
        write_files({self.directory / "run.json": as_json(self.facts)})

    def is_done(self, stage: str) -> bool:
        return stage in self.facts["done"]

    def mark_done(self, stage: str) -> None:
        """Its results are on disk: a resumed run takes them from there."""
        self.record(done=[*self.facts["done"], stage])


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
