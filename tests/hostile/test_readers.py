"""Readers of configs, structures and manifests give what can be used, or a `ValueError` that names the file."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_pl import SVD, TiledSVD, Tucker2
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.reading import check_yaml, read_json, read_yaml
from lowrank_pl.run_files import read_facts
from lowrank_pl.structures import layout_from_dict
from lowrank_pl.sweep import Sweep

pytestmark = pytest.mark.slow

TRIALS = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = st.sampled_from(
    [0, -1, 1, 2**31, 2**40, 2**63, 10**400, True, "same", "zeros", "linear", "conv", "${a}", None]
)
LEAVES = st.one_of(SPECIAL, st.integers(), st.integers(0, 9), st.floats(), st.text(max_size=9))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))

LINEAR = LayerSpec("linear", 12, 10)
GROUPED = LayerSpec("conv", 8, 6, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 2)
CONVOLUTION = GROUPED.with_(groups=1)
STRUCTURES = [
    (LINEAR, SVD().layout(LINEAR, (2,)).to_dict()),
    (LINEAR, TiledSVD(4).layout(LINEAR, (1,)).to_dict()),
    (GROUPED, SVD().layout(GROUPED, (2,)).to_dict()),
    (CONVOLUTION, Tucker2().layout(CONVOLUTION, (2, 3)).to_dict()),
    (CONVOLUTION, TiledSVD(4).layout(CONVOLUTION, (2,)).to_dict()),
    (LINEAR, {"kind": "constant"}),
]


def value_of(read: Callable[[], Any], name: str) -> Any:
    """What a reader gives; None where it refuses, by the name of the file."""
    try:
        return read()
    except ValueError as error:
        if name not in str(error):
            raise
        return None


def mutated(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """With some values replaced, left out or added."""

    def apply(changes: list[tuple[str, Any, bool]]) -> dict[str, Any]:
        values = dict(good)
        for key, value, drop in changes:
            values.pop(key, None) if drop else values.update({key: value})
        return values

    keys = st.one_of(st.sampled_from(sorted(good)), st.text(max_size=5))
    return st.lists(st.tuples(keys, VALUES, st.booleans()), max_size=3).map(apply)


@TRIALS
@given(mutated(GROUPED.to_dict()))
def test_a_layer_is_sane_or_refused(values: dict[str, Any]) -> None:
    layer = value_of(lambda: LayerSpec.from_dict(values), "")
    if layer is not None:
        assert 0 < layer.num_weights < 2**40
        assert LayerSpec.from_dict(layer.to_dict()) == layer


@TRIALS
@given(st.sampled_from(STRUCTURES).flatmap(lambda pair: st.tuples(st.just(pair[0]), mutated(pair[1]))))
def test_a_structure_is_built_in_bounds_or_refused(pair: tuple[LayerSpec, dict[str, Any]]) -> None:
    layout = value_of(lambda: layout_from_dict(pair[1], pair[0]), "")
    if layout is not None:
        assert all(0 <= math.prod(shape) < 2**40 for shape in layout.shapes())


@pytest.mark.parametrize(("layer", "values"), STRUCTURES)
def test_the_unchanged_ones_are_read(layer: LayerSpec, values: dict[str, Any]) -> None:
    assert layout_from_dict(values, layer).to_dict() == values


@TRIALS
@given(VALUES | mutated({"status": "running", "links": {}, "done": []}))
def test_facts(tmp_path: Path, value: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps(value))
    facts = value_of(lambda: read_facts(tmp_path), "run.json")
    if facts is not None:
        assert [type(facts[name]) for name in ("status", "links", "done")] == [str, dict, list]


@TRIALS
@given(VALUES | st.dictionaries(st.sampled_from("012"), st.lists(st.text(max_size=5))).map(lambda jobs: {"jobs": jobs}))
def test_manifests(tmp_path: Path, value: Any) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(value))
    sweep = value_of(lambda: Sweep.open(tmp_path, [], extend=True), "sweep.json")
    if sweep is not None:
        assert all(isinstance(word, str) for job in sweep.jobs.values() for word in job)


@TRIALS
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    for read in (read_json, read_yaml):
        str(value_of(partial(read, file), str(file))).encode()


@TRIALS
@given(VALUES)
def test_what_we_write_is_read(value: Any) -> None:
    text = yaml.safe_dump(value)
    if "&id" not in text:  # the same object twice
        check_yaml(text, "name")
