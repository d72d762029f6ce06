"""Reports over many runs: what they gather, how they look, what they survive."""

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowrank_pl.overview import gather, overview_tables, page, to_csv, to_markdown
from lowrank_pl.overview.tables import rows

CONFIG = """\
model: {{net: {{_target_: lowrank_pl.models.LeNet300}}, weights: null}}
data: {{_target_: lowrank_pl.data.MNIST, seed: 0}}
compression:
  _target_: lowrank_pl.LearningCompression
  lambda_: {lambda_}
  method: {{_target_: lowrank_pl.SVD}}
"""


def make_run(folder: Path, macs: int = 40_000, error: float = 0.02, lambda_: float = 1e-3, layers: int = 3) -> Path:
    folder.mkdir(parents=True)
    facts = {"status": "finished", "command": f"lowrank-pl train x={lambda_}", "links": {}, "done": ["fit"]}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(CONFIG.format(lambda_=lambda_))
    size = {"params": macs + 410, "macs": macs, "latency_ms": {"1": 0.02, "32": 0.08}}
    dense = {"params": 266_610, "macs": 266_200, "latency_ms": {"1": 0.07, "32": 0.6}}
    spectrum = {"index": list(range(1, 25)), "value": [1 / i for i in range(1, 25)]}
    report = {
        "dense": {"accuracy": 0.98, **dense},
        "compressed": {"accuracy": 1 - error, **size},
        "layers": [
            {
                "name": f"block{i}.conv", "structure": "3 > 7", "dense": dense, "compressed": size, "note": "",
                "spectrum": spectrum,
            }
            for i in range(layers)
        ],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    rows = [{"step": i, "lowrank/gap": 0.5 / (i + 1), "lowrank/rank/net.fc1": 20 - i % 7} for i in range(400)]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def data_of(html: str) -> dict[str, Any]:
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', html)
    assert packed is not None
    return json.loads(zlib.decompress(base64.b64decode(packed[1])))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i, (macs, error) in enumerate([(20_000, 0.03), (40_000, 0.02), (50_000, 0.025), (90_000, 0.015)]):
        make_run(tmp_path / "runs" / str(i), macs, error, lambda_=(i + 1) / 1000)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("speedup", "shown"),
    [({"value": 7.5, "low": 7.0, "high": 8.0}, "7.50x"), ({"value": 7.5, "low": 0.9, "high": 8.0}, "even"),
     ({"value": 7.5, "low": 0.9}, "7.50x"), ({"low": "x", "high": []}, "7.50x"), (3, "7.50x")],
)  # fmt: skip
def test_times_that_are_not_told_apart_are_even(tmp_path: Path, speedup: Any, shown: str) -> None:
    file = make_run(tmp_path / "run") / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "speedup": {"32": speedup}}))
    (row,) = rows(gather([tmp_path]))
    assert row[9] == shown


def test_the_table_has_every_run_and_marks_the_pareto_front(runs: Path) -> None:
    entries = gather([runs])
    lines = list(csv.DictReader(io.StringIO(to_csv(entries))))
    assert [line["run"] for line in lines] == ["0", "1", "2", "3"]
    assert [line["pareto"] for line in lines] == ["1", "1", "0", "1"]  # 2 costs more than 1 and errs more
    assert math.isclose(float(lines[1]["error"]), 2.0)
    assert (lines[1]["macs"], lines[1]["dense_macs"], lines[1]["latency_32_ms"]) == ("40000", "266200", "0.08")
    assert lines[1]["method"] == "lc svd lambda=0.002"
    assert lines[1]["group"] == "LeNet300 on MNIST"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(overview_tables(entries))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "2.00*" in text
    assert "6.66x" in text  # 266,200 / 40,000
    assert "| 2.50  | +0.50 |" in to_markdown(entries)


def test_the_page_holds_the_curves_and_the_papers_points(runs: Path) -> None:
    html = page(gather([runs]))
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["0", "1", "2", "3"]
    assert data["runs"][0]["ranks"]["net.fc1"][0] == [0, 20.0]
    assert len(data["runs"][0]["curves"]["gap"]) <= 160
    assert {(p["macs"], p["error"]) for p in data["published"]} >= {(45330.0, 1.87), (24102.0, 2.39)}
    assert set(re.findall(r"\w+://[\w./]+", html)) == {"http://www.w3.org/2000/svg"}  # a name; nothing is fetched


def test_unfinished_and_damaged_runs_are_said_to_be_so(runs: Path) -> None:
    for name, file, text in (
        ("a", "run.json", "{"), ("b", "report.json", "[1"), ("c", "config.yaml", "a: [1"),
        ("d", "metrics.csv", "step,x\n1,\x00"),
        ("e", "report.json", '{"compressed": 3, "dense": [], "layers": 5}'), ("f", "config.yaml", "- 1"),
        ("g", "report.json", '{"compressed": {"accuracy": "much", "macs": null}, "dense": {"accuracy": NaN}}'),
    ):  # fmt: skip
        (make_run(runs / name) / file).write_text(text)
    unfinished = make_run(runs / "h")
    (unfinished / "report.json").unlink()
    facts = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    failed = make_run(runs / "i")
    (failed / "run.json").write_text(json.dumps({**facts, "status": "failed", "error": "the disk\nis full"}))
    entries = gather([runs])
    assert len(entries) == 13
    status = {e.name: e.problem or e.status for e in entries}
    assert status["h"] == "stopped"  # by whatever: no process works on it
    assert "run.json is not JSON" in status["a"]
    assert status["i"] == "failed: the disk is full"
    for text in (to_csv(entries), to_markdown(entries), page(entries)):
        assert "stopped" in text


def test_runs_that_failed_or_stayed_dense_are_shown_for_what_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    make_run(folder / "good")
    failed, dense = make_run(folder / "failed"), make_run(folder / "dense", macs=266_200)
    facts = json.loads((failed / "run.json").read_text())
    problem = "`val_fraction` 1e-05 of 1437 training images leaves one of the sets empty"
    (failed / "run.json").write_text(json.dumps({**facts, "status": "failed", "error": problem}))
    (failed / "report.json").unlink()
    report = json.loads((dense / "report.json").read_text())
    for layer in report["layers"]:
        layer["structure"] = "dense"
    (dense / "report.json").write_text(json.dumps(report))
    entries = gather([folder])
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(overview_tables(entries))
    shown = console.export_text()
    by_name = {line.split()[0]: line for line in shown.splitlines() if line.startswith((" good", " failed", " dense"))}
    assert by_name["good"].split()[1:4] == ["lc", "svd", "lambda=0.001"]
    assert by_name["failed"].split()[-1] == "failed"
    assert f"failed: failed: {problem}" in shown
    assert "lambda=0.001, all dense" in by_name["dense"]
    assert "1.00x" in by_name["dense"]
    assert "all dense" in to_markdown(entries)
    assert [run["status"] for run in data_of(page(entries))["runs"] if run["name"] == "dense"] == [
        "finished, every layer stayed dense"
    ]


def test_runs_are_found_once_at_any_depth_and_named_by_where_they_lie(runs: Path) -> None:
    make_run(runs / "sweep" / "deep" / "10")
    make_run(runs / "0" / "inner")  # a run within a run belongs to it
    names = [entry.name for entry in gather([runs, runs / "sweep"])]
    assert len(names) == 5
    assert sum("deep" in name for name in names) == 1
    assert [entry.name for entry in gather([runs / "0"])] == ["0"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gather([runs / "nowhere"])


def test_what_a_run_says_is_never_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)><script>alert(2)</script>[bold]"
    run = make_run(tmp_path / "runs" / "<img src=x onerror=alert(3)>")
    config = f"model: {{net: {{_target_: 'a.{evil}'}}}}\ndata: {{_target_: x}}\ncompression: {{}}\n"
    (run / "config.yaml").write_text(config)
    report = json.loads((run / "report.json").read_text())
    report["layers"][0] |= {"name": evil, "note": evil, "structure": evil}
    (run / "report.json").write_text(json.dumps(report))
    entries = gather([tmp_path])
    html = page(entries)
    assert html.count("<script") == html.count("</script") == 2
    assert "<img" not in html
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(overview_tables(entries))
    assert "[bold]" in console.export_text()


def test_two_hundred_runs_take_seconds_and_a_small_page(tmp_path: Path) -> None:
    for i in range(200):
        make_run(tmp_path / "runs" / str(i), 20_000 + i, 0.02 + i / 1e4, layers=56)
    begin = time.monotonic()
    words = [sys.executable, "-m", "lowrank_pl.cli", "report", str(tmp_path / "runs")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 10
    assert (tmp_path / "runs" / "runs.html").stat().st_size < 5e6
    assert len((tmp_path / "runs" / "runs.csv").read_text().splitlines()) == 201


def test_the_command_line_says_what_is_missing_and_imports_little(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lowrank_pl.cli", "report", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no run" in done.stderr
    code = "import sys, lowrank_pl.cli.report; assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const d = document.body.dataset;
  d.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  d.errors = window.failures || 0;
}, 1500));
addEventListener("error", () => { window.failures = (window.failures || 0) + 1; });</script>"""


def browse(file: Path, width: int, anchor: str = "") -> str:
    """The page's elements in headless Chromium after its script has run; a screenshot lies beside it."""
    probed = file.with_name(f"probed{width}{anchor}.html")
    probed.write_text(file.read_text().replace("<head>", f"<head>{PROBE}"))
    base = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={file.parent / 'profile'}",
        "--virtual-time-budget=8000", f"--window-size={width},1400",
    ]  # fmt: skip
    address = f"file://{probed}{'#' + anchor if anchor else ''}"
    for what in (f"--screenshot={probed.with_suffix('.png')}", "--dump-dom"):
        done = subprocess.run([*base, what, address], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("anchor", ["", "run2"])
def test_in_a_browser(runs: Path, width: int, anchor: str) -> None:
    (runs / "runs.html").write_text(page(gather([runs])))
    seen = browse(runs / "runs.html", width, anchor)
    assert 'data-ready="1"' in seen
    assert 'data-errors="0"' in seen
    assert 'data-overflow="0"' in seen  # no sideways scrolling of the page
    assert len(re.findall(r'<circle class="run', seen)) == 4
    assert ("<h3>Ranks at each C step" in seen) == bool(anchor)
    assert ("<h2>2</h2>" in seen) == bool(anchor)
    assert ("lowrank-pl train x=0.003</pre>" in seen) == bool(anchor)
