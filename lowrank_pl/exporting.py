"""Networks for where they are deployed: files that run without lowrank_pl, for batches of any size."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.files import write_files

Runner = Callable[[Tensor], Tensor]
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx"}


def export(net: nn.Module, images: Tensor, path: str | Path) -> float:
    """Write the network as the file's suffix says, `.pt2` (torch.export) or `.onnx` (the dynamo exporter).

    Before the file is put in its place it is run on `images` [N, C, H, W], N at least 2, and on the first of them
    alone, and compared with the network. Returns the largest difference, of the largest output's size; raises
    `ValueError` if it is above 1e-3, or for another suffix, `ImportError` without the packages for ONNX.
    """
    path, net = Path(path), net.cpu().eval()
    images = images.contiguous()
    if len(images) < 2:
        raise ValueError(f"Expected argument `images` to be at least 2 images but got {len(images)}")
    if path.suffix not in SUFFIXES.values():
        raise ValueError(f"Expected a file name ending in {' or '.join(SUFFIXES.values())} but got {path.name!r}")
    with _quiet(), torch.no_grad():
        data = (_to_pt2 if path.suffix == ".pt2" else _to_onnx)(net, images)
        run = _pt2_runner(io.BytesIO(data)) if path.suffix == ".pt2" else _onnx_runner(data)
        difference = max(disagreement(run(batch), net(batch)) for batch in (images, images[:1]))
    if not difference <= 1e-3:
        raise ValueError(f"{path.name}: the exported network differs by {difference:.2g} on the same images")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: data})
    return difference


def load_exported(path: str | Path) -> Runner:
    """What runs an exported file on the CPU. A `.pt2` file can hold pickles: open only those that you made.

    Raises `ValueError` for a damaged file.
    """
    path = Path(path)
    try:
        return _pt2_runner(path) if path.suffix == ".pt2" else _onnx_runner(path.read_bytes())
    except (ImportError, OSError):
        raise
    except Exception as error:  # each reader has its own
        raise ValueError(f"{path} cannot be read ({str(error)[:200]}): export it again") from error


def disagreement(outputs: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value's size; infinite for other shapes."""
    if outputs.shape != expected.shape:
        return float("inf")
    return float((outputs.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def _to_pt2(net: nn.Module, images: Tensor) -> bytes:
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _to_onnx(net: nn.Module, images: Tensor) -> bytes:
    _needs("onnx", "onnxscript", "onnxruntime")
    program: Any = torch.onnx.export(
        net, (images,), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    content: bytes = program.model_proto.SerializeToString()
    return content


def _pt2_runner(file: Any) -> Runner:
    module = torch.export.load(file).module()
    return lambda images: module(images)


def _onnx_runner(data: bytes) -> Runner:
    _needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _needs(*names: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install "lowrank_pl[onnx]"')


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
