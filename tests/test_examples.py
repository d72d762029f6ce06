"""The scripts in `examples/` run from anywhere, and end with the report of a network that was saved and loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"bert_classification": "transformers", "speech_encoder": "transformers", "vit_deeptwist": "timm"}


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in text
        assert len(path.read_text().splitlines()) < 80


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"the extra `{NEEDS[name]}` is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Dense beside compressed" in done.stdout
    assert [path.parent.suffix for path in tmp_path.rglob("structure.json")] == [""]
