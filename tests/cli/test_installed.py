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


# what Python, Hydra or a library would look for in the current folder
FOUND_THERE = ("lowrank_pl/__init__.py", "random.py", "torch.py", "sitecustomize.py", "hydra_plugins/__init__.py")


@pytest.mark.parametrize("start", ["script", "isolated"])
def test_a_sweep_in_a_hostile_folder_runs_the_installed_package(start: str, installed: Path, tmp_path: Path) -> None:
    for name in FOUND_THERE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w'); raise ImportError('not this one')")
    (tmp_path / ".env").write_text("PYTHONSTARTUP=random.py\n")
    words = ["sweep", "model=lenet300", "data.size=8", "targets=all", "trainer.max_steps=2", "--dir", "sweep"]
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from lowrank_pl.cli import main; main()"
    # an empty entry of PYTHONPATH, as in `PYTHONPATH=$UNSET:x`, is the current folder
    command, path = {
        "script": ([sys.executable, str(installed / "bin" / "lowrank-pl")], str(installed)),
        "isolated": ([sys.executable, "-I", "-c", code], os.pathsep),
    }[start]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert not (tmp_path / "executed").exists(), done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": finished" in done.stdout
    assert "LeNet300 on Digits" in done.stdout
