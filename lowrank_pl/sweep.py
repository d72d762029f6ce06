"""Many runs in one folder, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lowrank_pl.files import write_files
from lowrank_pl.reading import read_json
from lowrank_pl.run_files import as_json, check_links, is_running, locked, read_facts

Job = list[str]  # overrides
MOST = 10_000  # jobs
_LOCK, _MANIFEST_LOCK, _LOG = ".lock", ".manifest.lock", "output.log"  # a sweep holds the first one while it runs


@dataclass
class Sweep:
    """A folder with `sweep.json`, which names the jobs, a run directory for each, and the `references` they share."""

    directory: Path
    jobs: dict[str, Job]
    _running: dict[str, _Started] = field(default_factory=dict, repr=False)
    _signal: int | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        jobs: Sequence[Job],
        extend: bool = False,
        check: Callable[[Job], None] | None = None,
    ) -> Sweep:
        """Write the manifest, or find the jobs in the one that is there. Raises `ValueError` for another grid, unless
        `extend` adds what is missing, for a folder that leads elsewhere, and where `check` does for a job that only the
        manifest has: it may be somebody else's."""
        path = Path(directory).absolute()
        manifest = path / "sweep.json"
        _check_own(path, _LOCK, _MANIFEST_LOCK, manifest.name, "references")
        with locked(path / _MANIFEST_LOCK):  # others may extend it now
            known = _read(manifest) if manifest.is_file() else {}
            there = {tuple(job) for job in known.values()}
            missing = [job for job in jobs if tuple(job) not in there]
            if known and not extend and (missing or len(jobs) != len(known)):
                raise ValueError(
                    f"{path} holds another grid, of {len(known)} jobs: {len(missing)} of these {len(jobs)} are not "
                    "among them. Add --extend to add them, or choose another --dir"
                )
            if len(known) + len(missing) > MOST:
                raise ValueError(f"{manifest}: expected at most {MOST:,} jobs but got {len(known) + len(missing):,}")
            given = {tuple(job) for job in jobs}
            for job in known.values():
                if check is not None and tuple(job) not in given:
                    _check_job(job, check, manifest)
            for job in missing:
                known[str(len(known))] = list(job)
            _check_own(path, *known, *(f"{name}/{_LOG}" for name in known))
            if missing:
                write_files({manifest: as_json({"jobs": known})})
        return cls(path, known)

    def status(self, name: str) -> str:
        """`finished`, `running` (in some process), `missing` (never begun), or how the run was left: `interrupted`,
        `stopped` (killed) or `failed`."""
        directory = self.directory / name
        try:
            facts = read_facts(directory)
        except ValueError:  # damaged; `resume` says so
            return "failed"
        if is_running(directory):
            return "running"
        if facts is None:  # a job that was begun has at least a log
            return "failed" if (directory / _LOG).is_file() else "missing"
        return "stopped" if facts["status"] == "running" else facts["status"]

    def run(self, at_once: int, options: Sequence[str], say: Callable[[str], None]) -> int:
        """Run or resume what is not finished, so many jobs at a time. Returns an exit code: 0 if all are finished.

        `options` go to every `lowrank-pl train`. On SIGINT or SIGTERM the jobs save and end; a second one kills them.
        """
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        waiting = iter([f"another sweep works on {self.directory}: waiting until it ends"])

        def wait() -> None:
            for line in waiting:  # once
                say(line)
            if self._signal is not None:
                raise KeyboardInterrupt

        try:
            with locked(self.directory / _LOCK, wait):
                self._run(at_once, list(options), say)
        except KeyboardInterrupt:  # while it waited; nothing of it runs
            pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal is not None:
            return 128 + self._signal
        return int(any(self.status(name) != "finished" for name in self.jobs))

    def _run(self, at_once: int, options: list[str], say: Callable[[str], None]) -> None:
        # the same training would diverge again
        waiting = [name for name in self.jobs if self.status(name) not in ("finished", "running", "diverged")]
        for name in self.jobs:
            if name not in waiting:
                say(f"{self.title(name)}: {self.status(name)}")
        threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // at_once)
        while self._running or (waiting and self._signal is None):
            while waiting and len(self._running) < at_once and self._signal is None:
                name = waiting.pop(0)
                say(f"{self.title(name)}: {'resumes' if self._is_begun(name) else 'starts'}")
                try:
                    self._running[name] = self._start(name, options, threads)
                except (ValueError, OSError) as error:  # the others go on
                    say(f"{self.title(name)}: failed: {error}")
            for name, job in list(self._running.items()):
                if job.process.poll() is not None:
                    del self._running[name]
                    say(f"{self.title(name)}: {self._outcome(name, job)}")
            time.sleep(0.1)

    def _is_begun(self, name: str) -> bool:
        return (self.directory / name / "config.yaml").is_file()

    def _start(self, name: str, options: list[str], threads: int) -> _Started:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        check_links(directory)  # before its log is written
        if self._is_begun(name):
            words = ["resume", str(directory), *(word for word in options if word.startswith("--allow="))]
        else:
            places = {"hydra.run.dir": directory, "paths.references": self.directory / "references"}
            own = [f"{key}={quoted(place)}" for key, place in places.items() if not self._gives(name, key)]
            words = ["train", *options, *self.jobs[name], *own]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log_file = directory / _LOG
        if log_file.is_file() and log_file.stat().st_nlink > 1:  # a backup, or anything: it keeps the text
            log_file.unlink()
        with open(log_file, "ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                command(*words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches them from here, once
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            return _Started(process, log_file, offset)

    def _gives(self, name: str, key: str) -> bool:
        return any(word.lstrip("+").startswith(f"{key}=") for word in self.jobs[name])

    def _outcome(self, name: str, job: _Started) -> str:
        """How a job has ended, and where it failed, why."""
        code = job.process.returncode
        status = self.status(name)
        if status == "finished":
            return status
        if code > 128 or (code < 0 and self._signal is not None):  # by our signal before it could listen
            return "interrupted"
        return f"{'diverged' if status == 'diverged' else 'failed'}: {job.reason()}, see {job.log}"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for job in self._running.values():
            job.process.send_signal(signal.SIGTERM if self._signal is None else signal.SIGKILL)
        self._signal = number

    def title(self, name: str) -> str:
        """The job's number, and what sets it apart from the others: the last parts of the keys."""
        common = set.intersection(*map(set, self.jobs.values())) if len(self.jobs) > 1 else set()
        words = [word.partition("=") for word in self.jobs[name] if word not in common]
        return " ".join([f"[{name}]", *(key.rpartition(".")[2] + sign + value for key, sign, value in words)])


@dataclass(frozen=True)
class _Started:
    """A job's process, its log, and how long that was when it started."""

    process: subprocess.Popen[bytes]
    log: Path
    offset: int

    def reason(self) -> str:
        """The last line of the error; where nothing was said, what ended the process."""
        with open(self.log, "rb") as file:
            file.seek(self.offset)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        said = [line for line in lines if line and not line.startswith("Set the environment variable HYDRA_FULL_ERROR")]
        code = self.process.returncode
        if code < 0:
            return f"ended by signal {-code}"
        return said[-1][:200] if said else f"exit code {code}"


def command(*words: str) -> list[str]:
    """`lowrank-pl words` for a process of its own, with the very modules that this one imports.

    Python would look into the current folder first: `python -m lowrank_pl.cli`, started in a checkout or beside a
    `random.py`, imports what lies there.
    """
    code = f"import sys; sys.path[:] = {[str(p) for p in sys.path]!r}; from lowrank_pl.cli import main; main()"
    # -E: an empty entry of PYTHONPATH would be the current folder, before the line above is reached
    return [sys.executable, "-E", "-u", "-c", code, *words]


def quoted(value: Any) -> str:
    """A value that Hydra's grammar takes as it is."""
    if re.fullmatch(r"[\w/.-]+", str(value), re.ASCII):
        return str(value)
    text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), str(value))
    return f"'{text}'"


def _read(manifest: Path) -> dict[str, Job]:
    try:
        jobs: dict[str, Job] = read_json(manifest)["jobs"]
        good = all(
            name == str(number) and isinstance(job, list) and all(isinstance(word, str) for word in job)
            for number, (name, job) in enumerate(jobs.items())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{manifest}: expected jobs named 0, 1, ... with a list of overrides each")
    return jobs


def _check_job(job: Job, check: Callable[[Job], None], manifest: Path) -> None:
    try:
        check(job)
    except ValueError as error:
        raise ValueError(f"{manifest}: {error}") from error


def _check_own(directory: Path, *names: str) -> None:
    """What a sweep writes into lies in its folder: a link would lead elsewhere, and a pipe would wait for a reader."""
    for place in (directory / name for name in names):
        if place.is_symlink() or (place.exists() and not (place.is_file() or place.is_dir())):
            raise ValueError(f"{place}: expected a file or folder of the sweep, not a link or pipe: remove it")


def _end_with_parent() -> None:
    """Also when it is killed, a job saves and ends with its sweep (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
