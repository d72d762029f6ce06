"""Whether what a run goes on from is still what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_pl.checksums import check_sum, sum_file
from lowrank_pl.runs.directory import Run
from lowrank_pl.storage import check_compressed


def check_data(run: Run, data: Any, force: bool) -> None:
    """Raise `ValueError` where the data are not those that the run was started with, unless `force`.

    Remembers them in `run.json` by the data module's `fingerprint`, which ours have after `setup()`.
    """
    now, before = getattr(data, "fingerprint", None), run.facts.get("data")
    if now is None or now == before:
        return
    if before is not None and not force:
        raise ValueError(
            f"the data are not those that {run.directory} was started with (`data`: {type(data).__name__}): put them "
            "back, start another run, or add --force"
        )
    run.record(data=now)


def stages_again(directory: Path, done: list[str]) -> tuple[list[str], str]:
    """Which of the stages that are done have left nothing that can be used, and why."""
    tuned = "finetune" in done or (directory / "extracted").is_dir()
    if "fit" in done:
        try:
            if not (directory / "dense.safetensors").is_file():
                raise FileNotFoundError(f"{directory / 'dense.safetensors'} is missing")
            for name in ("dense.safetensors", "metrics.csv"):
                if (directory / name).is_file() or sum_file(directory / name).is_file():
                    check_sum(directory / name)
            check_compressed(directory / ("extracted" if tuned else "compressed"))
        except (ValueError, OSError) as error:
            return list(done), str(error)
    if "finetune" in done:
        try:
            check_compressed(directory / "compressed")
        except (ValueError, OSError) as error:
            return ["finetune"], str(error)
    return [], ""
