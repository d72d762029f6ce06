"""Starting from weights in a file."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_pl.checksums import check_sum


def load_weights(net: nn.Module, file: str | Path) -> None:
    """Copy the tensors of a safetensors file into `net`, in place; the names and shapes must be the same.

    Raises FileNotFoundError without the file, and ValueError, with `net` unchanged, if it does not fit, or is not what
    the sum beside it was made of.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file}: set `model.weights` to a safetensors file, or to null")
    check_sum(Path(file))
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file ({error}): set `model.weights` to one") from error
    differences = "; ".join(_differences(net.state_dict(), state))
    if differences:
        raise ValueError(f"{file} does not fit {type(net).__name__}: {differences}. Is it of another network or depth?")
    net.load_state_dict(state)


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterable[str]:
    # batches seen: not in files from before PyTorch 0.4.1, and used only without momentum
    missing = [key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")]
    unexpected = state.keys() - own.keys()
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            yield f"{len(names)} {what} ({', '.join(sorted(names)[:3])})"
