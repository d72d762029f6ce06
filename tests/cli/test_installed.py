"""The commands as `pip install .` installs them, in a folder whose modules have the same names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its command, from a wheel."""
    place = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    for name in ("lowrank_pl", "conf"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(place / "site"), str(place)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr or "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("a wheel cannot be built here")
    assert done.returncode == 0, done.stderr
    return place / "site"


def test_a_sweep_in_a_checkout_runs_the_installed_package(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "lowrank_pl").mkdir()
    for name in ("lowrank_pl/__init__.py", "random.py"):
        (tmp_path / name).write_text("raise ImportError('this is not the installed one')")
    words = ["model=lenet300", "data.size=8", "targets=all", "trainer.max_steps=2", "--dir", "sweep"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "lowrank-pl"), "sweep", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": finished" in done.stdout
    assert "LeNet300 on Digits" in done.stdout
