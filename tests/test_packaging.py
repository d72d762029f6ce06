"""What is installed, what importing imports, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowrank_pl"
LEVELS = [
    {"linalg", "layer_spec", "timing", "files", "run_files", "terminal"},
    {"layers"},
    {"decompositions", "choices"},
    {"costs"},
    {"ranks"},
    {"surgery", "targets", "compression"},
    {"methods", "extraction", "storage", "report", "exporting", "evaluation"},
    {"callbacks", "models", "data", "module", "schedules", "figures", "runs", "benchmarks", "overview", "sweep"},
    {"cli"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = LEVEL_OF[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == "lowrank_pl" and rest.split(".")[0] in LEVEL_OF:
            assert LEVEL_OF[rest.split(".")[0]] <= own, name
        assert root not in ("hydra", "omegaconf") or own == len(LEVELS) - 1, name
        assert root != "pytorch_lightning" or own >= len(LEVELS) - 2, name


def test_every_package_is_named() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert f'"{".".join(folder.relative_to(ROOT).parts)}"' in text
    assert '"lowrank_pl.conf" = ["**/*.yaml"]' in text


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import lowrank_pl", {"torch", "hydra", "pytorch_lightning"}),
        ("import lowrank_pl; [getattr(lowrank_pl, name) for name in lowrank_pl.__all__]", {"hydra"}),
        ("import lowrank_pl.extraction, lowrank_pl.storage, lowrank_pl.report", {"hydra", "pytorch_lightning"}),
    ],
)
def test_what_importing_imports(code: str, absent: set[str]) -> None:
    check = f"import sys; {code}; print(sorted({absent} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
