"""The curves of a metrics.csv, and the figure of them."""

from pathlib import Path

import pytest

from lowrank_pl.curves import read_curves
from lowrank_pl.figures import draw_run


def curves_of(text: str, folder: Path, most: int = 100) -> dict[str, list[list[float]]]:
    (folder / "metrics.csv").write_text(text)
    return read_curves(folder / "metrics.csv", lambda name: name != "unwanted", most)


def test_numbers_by_step(tmp_path: Path) -> None:
    curves = curves_of("epoch,step,a,unwanted,b\n0,1,2.5,7,\n0,3,nan,7,1e3\n0,,4,7,4\n0,5,x,7,inf\n0,6\n", tmp_path)
    assert curves == {"a": [[1, 2.5]], "b": [[3, 1000]]}


@pytest.mark.parametrize(("rows", "most", "kept"), [(100, 100, 100), (101, 100, 51), (1000, 160, 143), (1, 1, 1)])
def test_thinned_out(rows: int, most: int, kept: int, tmp_path: Path) -> None:
    (points,) = curves_of("step,a\n" + "".join(f"{i},{2 * i}\n" for i in range(rows)), tmp_path, most).values()
    assert len(points) == kept
    assert all(value == 2 * step for step, value in points)
    assert points[0] == [0, 0]


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "metrics.csv", bool, 10) == {}
    draw_run(tmp_path / "metrics.csv", tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "cells", ["1,nan,2", "1,inf,-inf", "x,1,2", ",1,2", "1,1e308,-1e308", "1e308,1,1", "2.5,0,0", "1,,abc", "1"]
)
def test_a_figure_of_odd_numbers(cells: str, tmp_path: Path) -> None:
    text = f"step,val/accuracy,lowrank/gap\n0,0.5,0.1\n{cells}\n"
    (tmp_path / "metrics.csv").write_text(text)
    draw_run(tmp_path / "metrics.csv", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"metrics.csv: expected UTF-8 text"):
        draw_run(tmp_path / "metrics.csv", tmp_path / "figure.png")
