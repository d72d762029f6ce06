"""ONNX files from elsewhere: what is no plain network of one input and one output is refused before it is loaded."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.exporting import load_exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper  # noqa: E402

IMAGE = torch.zeros(1, 3, 8, 8)
FLOAT = TensorProto.FLOAT


def model(nodes: list[Any], inputs: int = 1, outputs: int = 1, kind: int = FLOAT, initializers: Any = ()) -> Any:
    """A graph from `x` to `y`."""
    given = [helper.make_tensor_value_info("x" + "x" * i, FLOAT, ["n", 3, 8, 8]) for i in range(inputs)]
    found = [helper.make_tensor_value_info("y" + "y" * i, kind, None) for i in range(outputs)]
    graph = helper.make_graph(nodes, "g", given, found, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def numbers(name: str, *values: int) -> Any:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def outside(location: str) -> Any:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return model([helper.make_node("Add", ["x", "w"], ["y"])], initializers=[tensor])


def outside_in_a_node() -> Any:
    tensor = outside("../secret").graph.initializer[0]
    return model([helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])])


def loop() -> Any:
    """2^60 times around."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["v", "v"], ["u"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", FLOAT, None)],
        [value("d", TensorProto.BOOL, []), value("u", FLOAT, None)],
    )  # fmt: skip
    times = helper.make_tensor("times", TensorProto.INT64, [], [2**60])
    return model([helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)], initializers=[times])


def large(*shape: int) -> Any:
    """A few bytes that become many."""
    value = helper.make_tensor("value", FLOAT, [1], [1.0])
    return model(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["z"], value=value),
            helper.make_node("Add", ["x", "z"], ["y"]),
        ],
        initializers=[numbers("shape", *shape)],
    )


def slow() -> Any:
    """Products of large matrices, one after another."""
    value = helper.make_tensor("value", FLOAT, [1], [1.0])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["m0"], value=value)]
    nodes += [helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(200)]
    nodes += [helper.make_node("ReduceSum", ["m200"], ["s"]), helper.make_node("Add", ["x", "s"], ["y"])]
    return model(nodes, initializers=[numbers("shape", 3000, 3000)])


def plain(*words: str) -> Any:
    return model([helper.make_node(words[0], list(words[1:]), ["y"])])


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "two inputs": (lambda: model([helper.make_node("Add", ["x", "xx"], ["y"])], inputs=2), "one image|one input"),
    "no input": (
        lambda: model([helper.make_node("Constant", [], ["y"], value_float=1.0)], inputs=0),
        "one image|one input",
    ),
    "two outputs": (
        lambda: model([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["yy"])], outputs=2),
        "expected one input and one output but got 1 and 2",
    ),
    "data outside": (lambda: outside("../../../etc/passwd"), "weights in the file itself"),
    "data at an absolute path": (lambda: outside("/dev/zero"), "weights in the file itself"),
    "data outside in a node": (outside_in_a_node, "weights in the file itself"),
    "a loop": (loop, "without loops and branches but got Loop"),
    "a large constant": (lambda: large(100_000, 3, 1000, 1000), "one image in 1 GiB"),
    "a large sum": (lambda: large(40_000_000, 3, 8, 8), "one image in 1 GiB"),
    "large padding": (
        lambda: model(
            [helper.make_node("Pad", ["x", "pads"], ["y"])],
            initializers=[numbers("pads", 0, 0, 0, 0, 0, 0, 10**5, 10**5)],
        ),
        "one image in 1 GiB",
    ),
    "slow": (slow, "more than 5 s"),
    "an operation of somebody": (
        lambda: model([helper.make_node("Evil", ["x"], ["y"], domain="some.where")]),
        "cannot be read",
    ),
    "an unknown operation": (lambda: plain("Nothing", "x"), "cannot be read"),
    "a missing name": (lambda: plain("Add", "x", "nowhere"), "cannot be read"),
    "no graph": (lambda: onnx.ModelProto(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    make, message = CASES[name]
    file = tmp_path / "model.onnx"
    file.write_bytes(make().SerializeToString())
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load_exported(file, example=IMAGE)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 30
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x00" * 1000, b"\x3a" * 10_000, b"\x3a\xff\xff\xff\xff\x07"])
def test_what_is_no_onnx(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.onnx cannot be read"):
        load_exported(tmp_path / "model.onnx", example=IMAGE)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="expected a regular file"):
        load_exported(tmp_path / "model.onnx", example=IMAGE)
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(10**10)
    with pytest.raises(ValueError, match="expected at most 1 MiB"):
        load_exported(tmp_path / "large.onnx", most=2**20, example=IMAGE)


def test_a_plain_network_is_taken(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('a foreign module was imported')")
    (tmp_path / "model.onnx").write_bytes(plain("Relu", "x").SerializeToString())
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        run = load_exported("model.onnx", example=IMAGE)
    finally:
        os.chdir(before)
    assert torch.equal(run(torch.full((2, 3, 8, 8), -1.0)), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"does not run on \[2, 5, 8, 8\] images"):
        run(torch.zeros(2, 5, 8, 8))
