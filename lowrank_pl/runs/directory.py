"""A run's directory, and what it says about the run."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from lowrank_pl.checksums import is_signed, signature, sum_of
from lowrank_pl.files import write_files
from lowrank_pl.run_files import check_links, facts_text, lock, read_facts, remove_leftovers
from lowrank_pl.runs.diverging import Diverged
from lowrank_pl.runs.stopping import Interrupted

_NEXT = ".config.yaml.next"
_PACKAGES = ("lowrank_pl", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


@dataclass
class Run:
    """`config.yaml` (resolved), and `run.json`: command, seed, versions, status, stages that are done, sums of both.

    From `start` or `open` on this process alone works in the directory, until it ends, whatever ends it.
    """

    directory: Path
    facts: dict[str, Any]
    _lock: IO[bytes] | None = field(default=None, repr=False)

    @classmethod
    def start(
        cls, directory: str | Path, config: str, overrides: list[str], seed: int, links: dict[str, str] | None = None
    ) -> Run:
        """Make the directory and write what is known before anything is run; `ValueError` where a run lies already, or
        where something leads out of the directory.

        `links` says which values of the config repeat others: `{"data.seed": "seed"}`.
        """
        path = Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        check_links(path)
        held = lock(path)
        if (path / "run.json").is_file():
            raise ValueError(
                f"{path} holds a run already: go on with it by `lowrank-pl resume {shlex.quote(str(path))}`, or choose "
                "another `hydra.run.dir`"
            )
        remove_leftovers(path)
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
        run._put(config.encode())
        return run

    @classmethod
    def open(cls, directory: str | Path, force: bool = False) -> Run:
        """A run that was started before. Raises `FileNotFoundError` where there is none, `RuntimeError` while another
        process works on it, `ValueError` where something leads out of its directory, or (unless `force`) where
        `config.yaml` or `run.json` is not what was written."""
        path = Path(directory).absolute()
        if not any((path / name).is_file() for name in ("config.yaml", _NEXT)):
            raise FileNotFoundError(f"no config.yaml in {path}: expected the directory of a run")
        check_links(path)
        run = cls(path, {}, lock(path))
        run.facts = read_facts(path, force) or {"status": "running", "links": {}, "done": []}
        run._settle()
        remove_leftovers(path)
        check_stored(path, run.facts, force)
        return run

    @property
    def is_own(self) -> bool:
        """Whether this user has started the run with this very config, or has changed it so. False for runs from
        elsewhere, and for those of versions up to 0.2."""
        data = (self.directory / "config.yaml").read_bytes()
        return is_signed(data, self.facts.get("config", {}).get("signature"))

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
            status = "diverged" if isinstance(error, Diverged) else "failed"
            self.record(status=status, error=str(error)[:1000] or type(error).__name__)
            raise
        self.record(status="finished")

    @contextmanager
    def changed(self, config: str, **facts: Any) -> Iterator[None]:
        """Inside, with another config and these facts; both are taken back if an error ends it before a stage is done
        or a checkpoint written, so that values with which nothing can be trained do not stay."""
        before, config_before = copy.deepcopy(self.facts), (self.directory / "config.yaml").read_bytes()
        metrics = self._metrics()
        # not finished from here on: a kill leaves a run to go on with
        self.facts |= {**facts, "status": "running"}
        self._put(config.encode())
        reached = self._reached()
        try:
            yield
        except Interrupted:
            raise
        except Exception:
            if self._reached() == reached:
                if self._metrics() != metrics:  # a part of what was done is undone: to be made anew
                    before |= {"status": "interrupted", "done": []}
                self.facts = before
                self._put(config_before)
            raise

    def _put(self, config: bytes) -> None:
        """Write `config.yaml` and `run.json` as one: once `run.json` is in place, both are changed, because
        `_settle` ends what a kill has left undone."""
        self.facts["config"] = {"sha256": hashlib.sha256(config).hexdigest(), "signature": signature(config)}
        write_files({self.directory / _NEXT: config})
        self.record()
        os.replace(self.directory / _NEXT, self.directory / "config.yaml")

    def _settle(self) -> None:
        file = self.directory / _NEXT
        if file.is_file():
            if sum_of(file) == self.facts.get("config", {}).get("sha256"):
                os.replace(file, self.directory / "config.yaml")
            else:
                file.unlink()

    def _metrics(self) -> str | None:
        file = self.directory / "metrics.csv"
        return sum_of(file) if file.is_file() else None

    def _reached(self) -> tuple[list[str], set[Path]]:
        return self.facts["done"], set(self.directory.glob("**/*.ckpt"))

    def record(self, **facts: Any) -> None:
        """Add to what `run.json` says."""
        self.facts |= facts
        write_files({self.directory / "run.json": facts_text(self.facts)})

    def is_done(self, stage: str) -> bool:
        return stage in self.facts["done"]

    def mark_done(self, stage: str) -> None:
        """Its results are on disk: a resumed run takes them from there."""
        self.record(done=[*self.facts["done"], stage])


def check_stored(directory: Path, facts: dict[str, Any], force: bool = False) -> None:
    """Raise `ValueError` for a `config.yaml` that is not the one `run.json` tells of; with `force`, take it as it is.
    Runs of versions up to 0.2 do not say."""
    file, known = directory / "config.yaml", facts.get("config")
    if known is None or not file.is_file() or known.get("sha256") == (now := sum_of(file)):
        return
    if not force:
        raise ValueError(
            f"{file} is damaged or was edited: its SHA-256 is not the one in run.json. Values are changed by "
            "`lowrank-pl resume RUN key=value`; --force takes the file as it is"
        )
    facts["config"] = {"sha256": now}


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
