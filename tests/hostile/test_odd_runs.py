"""`lowrank-pl report` over good runs and odd ones: the good ones are shown, and what each odd one has."""

import base64
import csv
import json
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from killing import attack

GOOD = 100
CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "odd_runs.yaml").read_text())
CONFIG = """\
model: {net: {_target_: lowrank_pl.models.LeNet300}, weights: null}
data: {_target_: lowrank_pl.data.MNIST, seed: 0}
compression: {_target_: lowrank_pl.LearningCompression, lambda_: 0.001, method: {_target_: lowrank_pl.SVD}}
"""
DENSE = {"params": 266_610, "macs": 266_200, "latency_ms": {"1": 0.07, "32": 0.6}}
SIZE = {"params": 40_410, "macs": 40_000, "latency_ms": {"1": 0.02, "32": 0.08}}
SPECTRUM = {"index": [1, 2, 4], "value": [1.0, 0.1, 1e-9]}
LAYERS = [
    {"name": name, "structure": "3 > 7", "dense": DENSE, "compressed": SIZE, "note": "", "spectrum": SPECTRUM}
    for name in ("net.fc1", "net.fc2")
]
RUN = {
    "run.json": {"status": "finished", "command": "lowrank-pl train", "links": {}, "done": ["fit"]},
    "report.json": {
        "dense": {"accuracy": 0.98, **DENSE}, "compressed": {"accuracy": 0.97, **SIZE}, "layers": LAYERS,
    },
}  # fmt: skip
METRICS = "step,lowrank/gap,lowrank/rank/net.fc1\n" + "".join(f"{i},{1 / (i + 1)},{20 - i % 7}\n" for i in range(50))


def make_run(folder: bytes, files: dict[str, Any]) -> None:
    os.mkdir(folder)
    good = {name: json.dumps(values) for name, values in RUN.items()}
    for name, content in {**good, "config.yaml": CONFIG, "metrics.csv": METRICS, **files}.items():
        put(os.path.join(folder, name.encode()), name, content)


def put(path: bytes, name: str, content: Any) -> None:
    if isinstance(content, str):
        content = {"before": content, "repeat": "", "times": 0}
    if "link" in content:
        os.symlink(content["link"], path)
    elif "pipe" in content:
        os.mkfifo(path)
    elif "folder" in content:
        os.mkdir(path)
    elif "absent" not in content:
        with open(path, "wb") as file:
            file.write(data_of(name, content))
            if "sparse" in content:
                file.truncate(content["sparse"])


def data_of(name: str, content: dict[str, Any]) -> bytes:
    if "hex" in content:
        return bytes.fromhex(content["hex"])
    if "change" in content:
        values = json.loads(json.dumps(RUN[name]))
        for key, value in content["change"].items():
            *parents, last = key.split(".")
            inner = values
            for parent in parents:
                inner = inner[int(parent) if isinstance(inner, list) else parent]
            inner[int(last) if isinstance(inner, list) else last] = value
        return json.dumps(values).encode()
    text = content.get("before", "") + content.get("repeat", "") * content.get("times", 0) + content.get("after", "")
    return text.encode()


def name_of(case: dict[str, Any], number: int) -> bytes:
    folder = case.get("folder", "")
    return f"{number:03} ".encode() * ("folder" not in case) + (
        bytes.fromhex(folder["hex"]) if isinstance(folder, dict) else folder.encode()
    )


def shown(name: bytes) -> str:
    """As a report shall show it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fsdecode(name))


class Reader(HTMLParser):
    """The elements of a page, and what its handlers and links are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a report was made, with its output."""
    folder = tmp_path_factory.mktemp("hostile")
    runs = os.fsencode(folder / "runs")
    os.mkdir(runs)
    for i in range(GOOD):
        make_run(os.path.join(runs, f"good{i}".encode()), {})
    for i, case in enumerate(CASES):
        files = {name: content for name, content in case.items() if name not in ("folder", "says", "hidden", "unseen")}
        make_run(os.path.join(runs, name_of(case, i)), files)
    deep = [os.path.join(runs, *[b"d"] * depth) for depth in range(1, 1500)]  # deeper than Python's stack
    for path in deep:
        os.mkdir(path)
    os.symlink("..", os.path.join(runs, b"loop"))
    done = attack("report", "runs", folder=folder, seconds=60, memory=5 * 10**8)
    for path in reversed(deep):
        os.rmdir(path)
    assert done.is_clean, done.output[-2000:]
    assert done.code == 0, done.output[-2000:]
    return folder


@pytest.fixture(scope="module")
def rows(reported: Path) -> dict[str, dict[str, str]]:
    with open(reported / "runs" / "runs.csv", encoding="utf-8", newline="") as lines:
        return {row["run"].removeprefix("'"): row for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def data(reported: Path) -> dict[str, Any]:
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', (reported / "runs" / "runs.html").read_text("utf-8"))
    assert packed is not None

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(zlib.decompress(base64.b64decode(packed[1])), parse_constant=refuse)


def test_there_are_enough() -> None:
    assert len(CASES) >= 80


def test_the_good_ones_are_shown(reported: Path, rows: dict[str, dict[str, str]]) -> None:
    assert sum(name.startswith("good") and bool(row["error"]) for name, row in rows.items()) == GOOD
    assert len(rows) == GOOD + sum(not case.get("unseen") for case in CASES)
    table = (reported / "output.txt").read_text("utf-8")
    assert len(set(re.findall(r"^ *(good\d+) .* 3\.00", table, re.MULTILINE))) == GOOD


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{i}")
def test_each_odd_one_says_why(number: int, rows: dict[str, dict[str, str]], data: dict[str, Any]) -> None:
    case = CASES[number]
    name = shown(name_of(case, number))
    if case.get("unseen"):
        assert name not in rows
        return
    row = rows[name]
    (run,) = [run for run in data["runs"] if run["name"] == name]
    if case["says"] is None:
        assert ":" not in row["status"]
    else:
        assert case["says"] in row["status"]
        assert case["says"] in run["status"]
    hidden = bool(case.get("hidden"))
    assert (row["error"] == "" or row["dense_error"] == "") == hidden
    assert (run["compressed"]["error"] is None or run["dense"]["error"] is None) == hidden


def test_what_costs_nothing_is_not_the_best(rows: dict[str, dict[str, str]]) -> None:
    free = [row for row in rows.values() if row["macs"] == "0"]
    assert [row["pareto"] for row in free] == ["0"]


def test_the_problems_are_in_the_terminal_too(reported: Path) -> None:
    text = "".join((reported / "output.txt").read_text("utf-8").split())
    missing = [c["says"] for c in CASES if c["says"] and not c.get("unseen") and "".join(c["says"].split()) not in text]
    assert missing == []


def test_no_control_character_reaches_the_terminal(reported: Path) -> None:
    output = (reported / "output.txt").read_bytes().decode("utf-8")
    assert {c for c in output if not c.isprintable()} == {"\n"}
    assert max(map(len, output.splitlines())) <= 100 or "The page:" in max(output.splitlines(), key=len)


def test_no_cell_is_a_formula(reported: Path) -> None:
    with open(reported / "runs" / "runs.csv", encoding="utf-8", newline="") as lines:
        cells = [cell for row in csv.reader(lines) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert not [cell for cell in cells if not cell.isprintable()]
    assert "'=cmd|' C'!A0" in cells


def test_numbers_stay_numbers(rows: dict[str, dict[str, str]]) -> None:
    assert float(rows["good0"]["error"]) == pytest.approx(3.0)
    assert rows["good0"]["macs"] == "40000"


def test_the_page_is_whole_and_runs_nothing_foreign(reported: Path, data: dict[str, Any]) -> None:
    html = (reported / "runs" / "runs.html").read_text("utf-8")
    reader = Reader()
    reader.feed(html)
    assert reader.tags.count("script") == 2
    assert "img" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    links = [value or "" for name, value in reader.attributes if name in ("href", "src")]
    assert all(re.fullmatch(r"#run\d+", link) for link in links)
    assert len(data["runs"]) == GOOD + len([case for case in CASES if not case.get("unseen")])
    assert len(html) < 10**7


def test_markdown_is_a_table(reported: Path) -> None:
    text = (reported / "runs" / "runs.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 11 for line in lines)
    assert "<script" not in text
    assert "<img" not in text
    for case in CASES:
        if case["says"] and not case.get("unseen"):
            assert case["says"].replace("\\", "")[:30] in text.replace("\\", "")


def test_nothing_was_run_or_left(reported: Path) -> None:
    assert not list((reported / "runs").glob("*/executed"))
    names = {path.name for path in (reported / "runs").iterdir() if path.is_file()}
    assert names == {"runs.csv", "runs.md", "runs.html"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into everything")
def test_a_folder_that_cannot_be_looked_into_is_listed(tmp_path: Path) -> None:
    make_run(os.fsencode(tmp_path / "good"), {})
    (tmp_path / "closed").mkdir(mode=0)
    done = attack("report", str(tmp_path), folder=tmp_path)
    assert done.code == 0
    assert "closed: cannot be looked into: Permission denied" in done.output
    (tmp_path / "closed").chmod(0o700)


# the peak of the process that this one became: `ru_maxrss` counts what its parent had before
REPORT_AND_PEAK = """
import runpy
try:
    runpy.run_module("lowrank_pl.cli", run_name="__main__", alter_sys=True)
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path: Path) -> None:
    """In 30 s of one core and 500 MB; the page and the table stay of a size that can be looked at."""
    values = json.loads(json.dumps(RUN["report.json"]))
    values["layers"] = values["layers"] * 10
    for i in range(10_000):
        values["compressed"] |= {"accuracy": 0.9 + i % 977 / 1e4, "macs": 10_000 + i % 1013}
        make_run(os.fsencode(tmp_path / f"{i}"), {"report.json": json.dumps(values), "config.yaml": long_config(i)})
    words = [sys.executable, "-c", REPORT_AND_PEAK, "report", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 30  # whatever else the machine does
    output, _, peak = output.rpartition("VmHWM:")
    assert int(peak.split()[0]) < 500e3
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 10_001
    assert (tmp_path / "runs.html").stat().st_size < 15e6
    assert len(output) < 100_000
    assert "400 of 10000 runs are shown here" in output


def long_config(seed: int) -> str:
    """As many keys as a config of ours has."""
    more = "".join(f"key{i}:\n  _target_: some.name\n  words: some words\n  number: {i}.5\n" for i in range(16))
    return f"{CONFIG}seed: {seed}\n{more}"
