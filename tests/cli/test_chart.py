"""`lowrank-pl chart` from outside."""

import csv
from pathlib import Path

import pytest
from killing import attack, finish, start

QUICK = ["--ranks", "2", "--seconds", "0.002"]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_chart_of_a_config(tmp_path: Path) -> None:
    words = ["chart", "model=resnet20", "--layers", "layer3.0.*,linear", "--structures", "svd,spatial_svd"]
    assert finish(*words, *QUICK, "--out", "out", folder=tmp_path) == 0, (tmp_path / "output.txt").read_text()
    rows = rows_of(tmp_path / "out" / "speedups.csv")
    found = {(row["layer"], row["structure"]) for row in rows}
    assert found == {(f"layer3.0.conv{i}", each) for i in (1, 2) for each in ("svd", "spatial_svd")} | {
        ("linear", "svd")
    }
    assert (tmp_path / "out" / "speedups.png").read_bytes().startswith(b"\x89PNG")
    said = (tmp_path / "output.txt").read_text()
    assert "measured / theoretical" in said
    assert "The figure: " in said


def test_torchvision_by_the_words_of_train(tmp_path: Path) -> None:
    words = ["model=torchvision", "model.net.name=squeezenet1_1", "--input", "3,64,64", "--layers", "features.3.*"]
    code = finish("chart", *words, "--structures", "svd", "--channels-last", *QUICK, folder=tmp_path)
    assert code == 0, (tmp_path / "output.txt").read_text()
    rows = rows_of(tmp_path / "charts" / "squeezenet1_1-batch1" / "speedups.csv")
    assert {row["size"] for row in rows} == {"15x15"}


@pytest.mark.parametrize("how", ["terminate", "interrupt", "minutes"])
def test_what_was_measured_is_kept(how: str, tmp_path: Path) -> None:
    limit = ["--minutes", "0.02"] if how == "minutes" else []
    words = [
        "chart",
        "--seconds",
        "0.5",
        "--ranks",
        "2",
        "--structures",
        "svd,tucker2,spatial_svd",
        "--out",
        "out",
        *limit,
    ]
    process = start(*words, folder=tmp_path)
    file = tmp_path / "out" / "speedups.csv"
    while process.is_alive() and not file.is_file():
        process.join(0.05)
    if how == "terminate":
        process.terminate()
    elif how == "interrupt":
        import os
        import signal

        os.kill(process.pid, signal.SIGINT)
    process.join(60)
    said = (tmp_path / "output.txt").read_text()
    assert 1 <= len({(row["layer"], row["structure"]) for row in rows_of(file)}) < 20
    assert "Traceback" not in said
    assert process.exitcode == {"terminate": -15, "interrupt": 130, "minutes": 0}[how], said
    if how != "terminate":
        assert (tmp_path / "out" / "speedups.png").is_file()
        assert f"{'Interrupted' if how == 'interrupt' else 'Stopped after 0.02 minutes'}: " in said
        assert "curves were measured" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("model=resnet21", "Expected `model` to be one of"),
        ("model.net.depth=21", "depth"),
        ("model=torchvision model.net.name=resnet19", "no classifier 'resnet19'"),
        ("--layers foo*", "Pattern 'foo*' in `layers` matches no linear layer"),
        ("--structures svd,svdd", "Expected `structures` to be some of"),
        ("model=lenet300 --structures tucker2", "Nothing to measure"),
        ("data=cifar10", "expected model=MODEL and model.net.KEY=VALUE but got 'data=cifar10'"),
        ("--ranks 1", "expected --ranks to be 2 or more but got 1"),
        ("--batch 0", "`batch`"),
        ("--seconds -1", "`seconds`"),
        ("--minutes 0", "expected --minutes to be above 0 but got 0"),
        ("--input 3,32", "expected three numbers such as 3,224,224 but got '3,32'"),
        ("--device foo", "Expected --device to be one of this machine's but got 'foo'"),
        ("--out output.txt/x", "output.txt"),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing(words: str, says: str, tmp_path: Path) -> None:
    outcome = attack("chart", *words.split(), folder=tmp_path, seconds=60)
    assert outcome.is_clean, outcome.output
    assert outcome.code not in (0, None)
    said = outcome.output.splitlines()
    assert says in said[-1]
    assert len(said) == 1 or said[0].startswith("usage: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["output.txt"]
