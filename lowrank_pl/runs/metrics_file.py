"""`metrics.csv`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lowrank_pl.checksums import sum_file
from lowrank_pl.files import write_files


class MetricsFile(Logger):
    """Logged metrics as rows of `save_dir/metrics.csv`, one per call, with the step; columns are added as they come.

    Unlike Lightning's CSVLogger it keeps a file that is there, until `cut` takes back what a stopped run logged after
    the checkpoint that it goes on from.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.rows = 0
        self._digest = hashlib.sha256()
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """One row: numbers, or tensors of one number."""
        numbers = {name: getattr(value, "item", lambda value=value: value)() for name, value in metrics.items()}
        self._waiting.append({"step": step, **numbers})
        self._count(self._waiting[-1])

    @rank_zero_only
    def save(self) -> None:
        """Append what has been logged since the last time."""
        new = [name for row in self._waiting for name in row if name not in self._columns]
        if new:
            self._rewrite([*self._columns, *dict.fromkeys(new)], self._read())
        if self._waiting:
            with open(self.path, "ab") as file:
                file.write(self._text(self._waiting))  # in one piece, so that no kill comes between two lines
            self._waiting.clear()

    def saved(self) -> tuple[int, str]:
        """The number of rows and a digest of them, when all of them are on the disk."""
        self.save()
        if self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())  # before a checkpoint that counts them
        return self.rows, self._digest.hexdigest()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def cut(self, rows: int, digest: str | None = None, force: bool = False) -> None:
        """Keep the first `rows` rows of the file, and go on after them.

        Raises `ValueError`, unless `force`, where there are fewer, or they have another digest.
        """
        kept = self._read()[:rows]
        self._waiting.clear()
        self.rows, self._columns, self._digest = 0, [], hashlib.sha256()
        for row in kept:
            self._count(row)
        if not force and (len(kept) < rows or digest not in (None, self._digest.hexdigest())):
            what = f"has {len(kept)} rows" if len(kept) < rows else "has been altered"
            raise ValueError(
                f"{self.path} {what}, and the checkpoint to go on from counts {rows}: put the file back, or add "
                "--force to go on with what is there"
            )
        sum_file(self.path).unlink(missing_ok=True)
        if kept:
            self._rewrite(list(kept[0]), kept)
        else:
            self.path.unlink(missing_ok=True)

    def _count(self, row: Mapping[str, Any]) -> None:
        # as text, and without the empty cells that a later column brings
        cells = {name: str(value) for name, value in row.items() if value not in (None, "")}
        self._digest.update(json.dumps(cells, sort_keys=True).encode())
        self.rows += 1

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        # a killed run may have left half a line, and damage anything: which the digest tells
        whole = self.path.read_bytes().decode(errors="replace").rpartition("\n")[0]
        try:
            rows = list(csv.DictReader(io.StringIO(whole)))
        except csv.Error as error:
            raise ValueError(f"{self.path} is damaged ({error}): put it back, or remove it and add --force") from error
        return [{name: row[name] or "" for name in row if name is not None} for row in rows]

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = dict(zip(columns, columns, strict=True))
        write_files({self.path: self._text([header, *rows])})

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()
