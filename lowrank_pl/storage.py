"""Compressed networks on disk: `model.safetensors` and `structure.json`, no pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.extraction import RECORD
from lowrank_pl.files import write_files
from lowrank_pl.reading import MEGABYTE, read_json
from lowrank_pl.structures import Layout, layout_from_dict
from lowrank_pl.surgery import deploy, detached_copy

FORMAT = 1
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_compressed(model: nn.Module, dirpath: str | Path) -> None:
    """Write what `compress` or `ExtractStructure` made into a folder, each file whole or not at all.

    The bytes depend on the network alone. Raises `ValueError` for a module that carries no record of its structure.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise ValueError(
            "Expected a network from compress() or ExtractStructure, which know its structure, but this "
            f"{type(model).__name__} carries no record of one"
        )
    weights = save({name: tensor.detach().contiguous().cpu().clone() for name, tensor in _state(model).items()})
    structure = {"format": FORMAT, **record}
    structure["sha256"] = checksum(weights, structure)
    folder = Path(dirpath)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected argument `dirpath` to be a folder but {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    write_files({
        folder / "model.safetensors": weights,
        folder / "structure.json": json.dumps(structure, indent=1, sort_keys=True).encode(),
    })  # fmt: skip


def check_savable(model: nn.Module) -> None:
    """Raise `ValueError` for a network whose state is not of tensors that can be saved."""
    _state(model)


def load_compressed(model: nn.Module, dirpath: str | Path) -> nn.Module:
    """The compressed network from a folder and a fresh dense instance of the same network, which is unchanged.

    Names, shapes and checksums are compared before anything is allocated. Raises `FileNotFoundError` for a missing
    file, `ValueError` for one that is truncated, altered or for another network.
    """
    folder = Path(dirpath)
    # a few times the dense network's: factors may be more, but not by much
    dense = sum(tensor.numel() * tensor.element_size() for tensor in _state(model).values())
    structure = check_compressed(folder, most=4 * dense + 16 * MEGABYTE)
    skeleton = _rebuild(model, structure["layers"], folder)
    tensors = _read_tensors(folder / "model.safetensors", _state(skeleton))
    with torch.no_grad():
        state = _state(skeleton)
        fresh = {
            id(target): nn.Parameter(tensors[name]) if target.is_floating_point() else tensors[name]
            for name, target in state.items()
            if target.is_meta
        }
        for name, target in state.items():
            if not target.is_meta:
                target.copy_(tensors[name])
    for module in skeleton.modules():  # tied ones stay tied
        own: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in own:
            held.update({name: fresh.get(id(tensor), tensor) for name, tensor in held.items()})
    setattr(skeleton, RECORD, {key: structure[key] for key in ("layers", "notes", "responses") if key in structure})
    return skeleton


def check_compressed(folder: Path, most: int = 2**62) -> dict[str, Any]:
    """The structure in a folder, once both files are what was written; for any network.

    Raises `FileNotFoundError` for a missing file, `ValueError` for one that is truncated or altered, or for weights of
    more than `most` bytes.
    """
    for name in ("structure.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Expected a folder written by save_compressed but {folder / name} is missing")
    structure = _read_structure(folder / "structure.json")
    size = (folder / "model.safetensors").stat().st_size
    if size > most:
        raise ValueError(f"{folder / 'model.safetensors'} is for another network: it has {size:,} bytes")
    if checksum((folder / "model.safetensors").read_bytes(), structure) != structure["sha256"]:
        raise ValueError(
            f"{folder} is truncated or altered: the checksum of model.safetensors and structure.json is not the one "
            "that was written with them. Save the network again"
        )
    return structure


def checksum(weights: bytes, structure: dict[str, Any]) -> str:
    """SHA-256 of both files' contents, the checksum itself apart. It tells damage, not malice."""
    described = json.dumps({key: value for key, value in structure.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(weights + described.encode()).hexdigest()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors once, under their first name."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} in the network's state is a {type(tensor).__name__}; expected tensors only")
        if tensor.dtype not in _TYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
            raise ValueError(f"{name!r} in the network's state is {tensor.dtype}; what can be saved is {known}")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _read_structure(path: Path) -> dict[str, Any]:
    try:
        structure = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is truncated or altered: {error}. Save the network again") from error
    fields = {"format": int, "sha256": str, "layers": dict, "notes": dict}
    if not isinstance(structure, dict) or any(not isinstance(structure.get(k), t) for k, t in fields.items()):
        raise ValueError(f"{path} is altered: expected the keys {sorted(fields)}. Save the network again")
    if structure["format"] != FORMAT:
        raise ValueError(f"{path} has format {structure['format']}; this version of lowrank_pl reads format {FORMAT}")
    return structure


def _rebuild(model: nn.Module, entries: dict[str, Any], folder: Path) -> nn.Module:
    """A copy of the dense network with empty modules, on the meta device, where the structure has factors."""
    skeleton = detached_copy(model)
    maps = find_maps(skeleton)
    parts = {}
    for name, entry in entries.items():
        if isinstance(entry, dict) and "tied" in entry:  # comes with what it is tied to
            continue
        if not isinstance(entry, dict) or not {"structure", "replaces"} <= set(entry):
            raise ValueError(f"Layer {name!r} in {folder / 'structure.json'} is altered. Save the network again")
        if name not in maps or entry["replaces"] != maps[name].layer.to_dict():
            raise ValueError(
                f"{folder} is for another network: layer {name!r} is {entry['replaces']} there and "
                f"{maps[name].layer.to_dict() if name in maps else 'missing'} here. Names of layers are those "
                "of the whole that was saved: of a LightningModule, unless ExtractStructure(submodule=...) was given. "
                "What register_adapter() had been given there is needed here, too"
            )
        with torch.device("meta"):
            layout = layout_from_dict(entry["structure"], maps[name].layer)
            _check_stages(name, layout, folder)
            module = layout.build(maps[name].bias is not None or entry.get("bias") is True)
            parts[name] = module.to(maps[name].read().dtype)
    return deploy(skeleton, parts).train(model.training)


def _check_stages(name: str, layout: Layout, folder: Path) -> None:
    """Raise `ValueError` for stages that pad, or widen their outputs, by more than the layer that they replace: then
    what runs through them takes memory that no weight stands for."""
    layer = layout.layer
    if len(layout.stages) > 16:
        raise ValueError(
            f"Layer {name!r} in {folder / 'structure.json'} is altered: it has {len(layout.stages)} stages"
        )
    for stage in layout.stages:
        if stage.kind == "linear" or layer.kind == "linear":
            continue
        for what in ("padding", "output_padding", "dilation", "stride", "kernel"):
            own, most = getattr(stage, what), getattr(layer, what)
            if isinstance(own, str) or not own:  # "same" keeps the size
                continue
            if isinstance(most, str):  # the layer's "same", written out
                most = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel, strict=True))
            if len(own) != len(most) or any(one > other for one, other in zip(own, most, strict=True)):
                raise ValueError(
                    f"Layer {name!r} in {folder / 'structure.json'} is altered: expected a {what} of at most "
                    f"{list(most)} but got {list(own)}. Save the network again"
                )


def _read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the file, if their names and shapes are the expected ones."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (*part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            wanted = {name: (*tensor.shape, _TYPES.get(tensor.dtype)) for name, tensor in expected.items()}
            different = sorted(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
            if different:
                name = different[0]
                raise ValueError(
                    f"{path} is for another network: {name!r} is {shapes.get(name)} there and "
                    f"{wanted.get(name)} here ({len(different)} such tensors)"
                )
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or altered: {error}. Save the network again") from error
