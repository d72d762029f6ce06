"""Networks for where they are deployed: files that run without lowrank_pl, for batches of any size."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.files import write_files
from lowrank_pl.reading import first_line, read_bytes

Runner = Callable[[Tensor], Tensor]
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
WEIGHTS = {".xml": ".bin"}  # of formats with a second file, which lies beside the first
TOLERANCE = 1e-3  # of the largest output's size, by which an exported network may differ


def export(net: nn.Module, images: Tensor, path: str | Path) -> float:
    """Write the network as the file's suffix says: `.pt2` (torch.export), `.onnx` (the dynamo exporter), or `.xml`
    (OpenVINO's IR in float32, with its weights in a `.bin` beside it).

    Before the file is put in its place it is run on `images` [N, C, H, W], N at least 2, and on the first of them
    alone, and compared with the network. Returns the largest difference, of the largest output's size; raises
    `ValueError` if it is above 1e-3, for a network that gives NaN or infinity, or for another suffix, `ImportError`
    without the packages that the format needs.
    """
    path, net = Path(path), net.cpu().eval()
    images = images.contiguous()
    if len(images) < 2:
        raise ValueError(f"Expected argument `images` to be at least 2 images but got {len(images)}")
    if path.suffix not in SUFFIXES.values():
        raise ValueError(f"Expected a file name ending in {' or '.join(SUFFIXES.values())} but got {path.name!r}")
    check_finite(net, images)
    with _quiet(), torch.no_grad():
        data = _WRITERS[path.suffix](net, images)
        run = _RUNNERS[path.suffix](*data)
        difference = max(disagreement(run(batch), net(batch)) for batch in (images, images[:1]))
    if not difference <= TOLERANCE:
        raise ValueError(f"{path.name}: the exported network differs by {difference:.2g} on the same images")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(dict(zip(files_of(path), data, strict=True)))
    return difference


def files_of(path: Path) -> list[Path]:
    """An exported network's file, and that of its weights where they are apart."""
    return [path, *([path.with_suffix(WEIGHTS[path.suffix])] if path.suffix in WEIGHTS else [])]


def load_exported(path: str | Path, most: int = 2**31, example: Tensor | None = None) -> Runner:
    """What runs an exported file of at most so many bytes on the CPU. A `.pt2` file can hold pickles: open only those
    that you made.

    With `example`, an image [1, C, H, W], an ONNX file is not trusted either: it may have neither loops nor data
    outside itself, and is first tried on that image in a process of its own, for 5 s and with 1 GiB. What it takes for
    other images, where shapes depend on their content (`NonZero`, a `Tile` by a computed number), is not bounded: here
    it runs in this process, where its time is measured.

    Raises `ValueError` for a file that is larger, damaged or of another kind; so does what is returned, for images that
    the network does not take, and outputs that are not one tensor.
    """
    path = Path(path)
    data = [read_bytes(file, most) for file in files_of(path)]
    try:
        if path.suffix == ".onnx" and example is not None:
            _check_foreign(data[0], example)
        run = _RUNNERS[path.suffix](*data)
    except ImportError:
        raise
    except Exception as error:  # each reader has its own
        raise ValueError(f"{path} cannot be read ({first_line(error)[:200]}): export it again") from error

    def checked(images: Tensor) -> Tensor:
        try:
            outputs: Any = run(images)
        except Exception as error:
            said = first_line(error)[:200]
            raise ValueError(f"{path} does not run on {list(images.shape)} images ({said})") from error
        if not isinstance(outputs, Tensor):
            raise ValueError(f"{path}: expected one tensor of outputs but got {type(outputs).__name__}")
        return outputs

    return checked


def disagreement(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value's size; infinite for other shapes, and where either has NaN
    or infinity."""
    if outputs.shape != expected.shape or not (outputs.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((outputs.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


@torch.no_grad()
def check_finite(net: nn.Module, images: Tensor) -> None:
    """Raise `ValueError` for a network that gives NaN or infinity."""
    if not net(images).isfinite().all():
        raise ValueError("the network gives NaN or infinity on these images: nothing is written. Train it again")


def _exported(net: nn.Module, images: Tensor) -> Any:
    return torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _to_pt2(net: nn.Module, images: Tensor) -> list[bytes]:
    buffer = io.BytesIO()
    torch.export.save(_exported(net, images), buffer)
    return [buffer.getvalue()]


def _to_openvino(net: nn.Module, images: Tensor) -> list[bytes]:
    _needs("openvino", extra="openvino")
    import openvino

    model = openvino.convert_model(_exported(net, images))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return [file.read_bytes() for file in files_of(path)]


def _to_onnx(net: nn.Module, images: Tensor) -> list[bytes]:
    _needs("onnx", "onnxscript", "onnxruntime")
    program: Any = torch.onnx.export(
        net, (images,), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return [program.model_proto.SerializeToString()]


def _pt2_runner(data: bytes) -> Runner:
    module = torch.export.load(io.BytesIO(data)).module()
    return lambda images: module(images)


def _openvino_runner(text: bytes, weights: bytes) -> Runner:
    _needs("openvino", extra="openvino")
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip  # else bfloat16 where the CPU has it
    model = core.compile_model(core.read_model(text, weights), "CPU", settings)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(f"expected one input and one output but got {len(model.inputs)} and {len(model.outputs)}")
    return lambda images: torch.from_numpy(model(images.numpy())[0].copy())


def _onnx_runner(data: bytes) -> Runner:
    _needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(f"expected one input and one output but got {len(inputs)} and {len(outputs)}")
    return lambda images: torch.from_numpy(session.run(None, {inputs[0].name: images.numpy()})[0])


_WRITERS = {".pt2": _to_pt2, ".onnx": _to_onnx, ".xml": _to_openvino}
_RUNNERS: dict[str, Callable[..., Runner]] = {".pt2": _pt2_runner, ".onnx": _onnx_runner, ".xml": _openvino_runner}


def _check_foreign(data: bytes, example: Tensor) -> None:
    """Raise `ValueError` for an ONNX file that should not be loaded into this process."""
    _needs("onnx", "onnxruntime")
    import onnx

    model = onnx.load_model_from_string(data)
    nodes = [node for holder in (model.graph, *model.functions) for node in holder.node]
    loops = sorted({node.op_type for node in nodes} & {"Loop", "Scan", "If", "SequenceMap"})
    if loops:  # how long those take depends on the image
        raise ValueError(f"expected a network without loops and branches but got {loops[0]}")
    attributes = [attribute for node in nodes for attribute in node.attribute]
    sparse = [*model.graph.sparse_initializer, *(attribute.sparse_tensor for attribute in attributes)]
    tensors = [*model.graph.initializer, *(part for tensor in sparse for part in (tensor.values, tensor.indices))]
    tensors += [tensor for attribute in attributes for tensor in (attribute.t, *attribute.tensors)]
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ValueError("expected all weights in the file itself but got some that are elsewhere")
    code = _TRIAL.format(path=sys.path, shape=tuple(example.shape))
    try:
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=5, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError("one image takes more than 5 s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it ends its process"]
        raise ValueError(f"it does not run on one image in 1 GiB: {said[-1]}")


# with the modules that this process imports, and nothing of the folder that it is started in
_TRIAL = """\
import sys
sys.path[:] = {path!r}
import numpy, onnxruntime
try:
    import resource
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = 2**30 if hard == resource.RLIM_INFINITY else min(2**30, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
except ImportError:
    pass  # Windows
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
session = onnxruntime.InferenceSession(sys.stdin.buffer.read(), options, providers=["CPUExecutionProvider"])
session.run(None, {{session.get_inputs()[0].name: numpy.zeros({shape}, numpy.float32)}})
"""


def _needs(*names: str, extra: str = "onnx") -> None:
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        kind = {"onnx": "ONNX", "openvino": "OpenVINO's IR"}[extra]
        raise ImportError(f'{kind} needs {", ".join(missing)}: pip install "lowrank_pl[{extra}]"')


@contextmanager
def _quiet() -> Any:
    """Without the exporters' remarks on themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
