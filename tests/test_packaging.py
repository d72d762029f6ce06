"""What is installed, what importing imports, and which way imports point."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lowrank_pl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lowrank_pl"
# Strict: what a room imports lies on a level above it in this list, or in the room itself. README.md draws the same.
LEVELS = [
    # 0: numbers and files
    {"checks", "names", "files", "reading", "terminal", "timing", "processes", "layer_spec", "linalg", "fingerprints"},
    {"checksums", "curves", "run_files"},
    # 1: one weight
    {"layers"},
    {"metric"},
    {"structures"},
    {"decompositions"},
    {"costs"},
    {"ranks"},
    # 2: one network
    {"adapters"},
    {"surgery", "moments"},
    {"tracing"},
    {"targets", "samples"},
    {"compression"},
    # 3: methods, no trainer
    {"planning", "methods"},
    {"extraction"},
    {"norms", "side_by_side"},
    {"one_shot", "storage", "report", "exporting", "product_decay", "speedups"},
    {"evaluation", "deployment"},
    # 4: Lightning
    {"module", "models", "data", "schedules", "figures"},
    {"callbacks"},
    {"runs", "sweep", "overview", "benchmarks"},
    # 5: command line
    {"cli"},
]
LIGHTNING = next(level for level, rooms in enumerate(LEVELS) if "module" in rooms)
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
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    own = LEVEL_OF[room]
    for name in imported(path):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "lowrank_pl" and other in LEVEL_OF and other != room:
            assert LEVEL_OF[other] < own, name
        assert root not in ("hydra", "omegaconf") or own == len(LEVELS) - 1, name
        assert root != "pytorch_lightning" or own >= LIGHTNING, name


def test_no_cycles_within_a_room() -> None:
    graph = {}
    for path in FILES:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = own.split(".")[1]
        inside = {name for name in imported(path) if name.split(".")[1:2] == [room]}
        if not path.name.startswith("__"):  # an __init__ imports from the files whose names it gives
            assert not any(name.rpartition(".")[0] == f"lowrank_pl.{room}" for name in inside), own
        graph[own] = {name.rpartition(".")[0] for name in inside} - {own}
    list(TopologicalSorter({name: {n for n in names if n in graph} for name, names in graph.items()}).static_order())


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


def test_type_checkers_see_the_names_that_python_sees() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lowrank_pl._HOME_OF
    assert {*seen, "__version__"} == set(lowrank_pl.__all__)
