"""The shape of one linear map, in integers: what counting and building need, and nothing else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, final

Kind = Literal["linear", "conv", "conv_transpose"]


@final
@dataclass(frozen=True)
class LayerSpec:
    """One linear layer or convolution, dense or a stage of a factorized one, without its bias.

    `padding` is a tuple or `"same"`. `inputs` holds, for one input of the network, one entry per call of the layer:
    `(vectors, *spatial size)`, where `vectors` counts how often the map is applied beyond the spatial positions
    (tokens of a linear layer, images folded into the batch). It is empty while nobody has seen the layer run.
    `share` says how often that happens: below 1 for a layer that some batches or some inputs pass by (layer drop, a
    mixture's expert), so that `share * inputs` is an average.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    inputs: tuple[tuple[int, ...], ...] = ()
    share: float = 1.0

    @property
    def operator_shape(self) -> tuple[int, ...]:
        """`[T, S / groups, *kernel]`, for transposed convolutions too (see `lowrank_pl.layers.as_operator`)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the weight as PyTorch stores it: `[S, T / groups, *kernel]` for transposed convolutions."""
        if self.kind != "conv_transpose":
            return self.operator_shape
        return (self.in_channels, self.out_channels // self.groups, *self.kernel)

    @property
    def num_weights(self) -> int:
        """Weights, the bias apart."""
        return math.prod(self.operator_shape)

    @property
    def macs(self) -> int | None:
        """Multiply-adds for one input of the network, on average; None while no input has been seen.

        As `torch.utils.flop_counter` counts (two FLOPs each): positions in the padding are counted, the bias is not.
        """
        if not self.inputs:
            return None
        return round(self.share * self.num_weights * sum(count for (count,) in self.positions))

    @property
    def positions(self) -> tuple[tuple[int], ...]:
        """How often each of its weights is multiplied by, call by call: `inputs` of the linear layer that its lowered
        matrix is."""
        sizes = self.inputs if self.kind == "conv_transpose" else self.outputs
        return tuple((math.prod(size),) for size in sizes)

    @property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """`inputs` of the layer that follows."""
        return tuple((vectors, *self._output_size(spatial)) for vectors, *spatial in self.inputs)

    def _output_size(self, spatial: list[int]) -> list[int]:
        if self.kind == "linear" or self.padding == "same":
            return spatial
        assert not isinstance(self.padding, str)
        axes = zip(spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.kind == "conv":
            return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        return [
            (n - 1) * s - 2 * p + d * (k - 1) + 1 + extra
            for (n, k, s, p, d), extra in zip(axes, self.output_padding, strict=True)
        ]

    def with_(self, **changes: Any) -> LayerSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def then(self, out_channels: int, **changes: Any) -> LayerSpec:
        """The layer that follows this one: linear after linear, else a `1 x 1` convolution unless told otherwise."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return LayerSpec(
            kind="linear" if self.kind == "linear" else "conv",
            in_channels=self.out_channels,
            out_channels=out_channels,
            kernel=ones,
            stride=ones,
            padding=zeros,
            dilation=ones,
            output_padding=zeros,
            inputs=self.outputs,
            share=self.share,
        ).with_(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON; what belongs to a run, not to the layer, is left out."""
        values = asdict(self)
        del values["inputs"], values["share"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Any) -> LayerSpec:
        """The inverse of `to_dict`. Raises `ValueError` for anything that is not a sane layer, or is absurdly large."""
        known = {field.name for field in fields(cls)} - {"inputs", "share"}
        if not isinstance(values, dict) or set(values) != known or not _is_sane(values):
            raise ValueError(f"Expected a layer with the keys {sorted(known)} but got {values!r:.200}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def _is_sane(values: dict[str, Any]) -> bool:
    """Whether the values of a dictionary from elsewhere make a layer that PyTorch could build."""

    def sizes(name: str, least: int) -> bool:
        numbers, axes = values[name], len(values["kernel"]) if name != "kernel" else None
        return (
            isinstance(numbers, list)
            and (axes is None or len(numbers) == axes)
            and all(type(n) is int and least <= n < _LARGEST for n in numbers)
        )

    channels = [values[name] for name in ("in_channels", "out_channels", "groups")]
    if not (sizes("kernel", 1) and all(type(n) is int and 1 <= n < _LARGEST for n in channels)):
        return False
    axes = (0,) if values["kind"] == "linear" else (1, 2, 3)
    return (
        values["kind"] in ("linear", "conv", "conv_transpose")
        and len(values["kernel"]) in axes
        and channels[0] % channels[2] == channels[1] % channels[2] == 0
        and math.prod([channels[0], channels[1], *values["kernel"]]) < _LARGEST
        and sizes("stride", 1)
        and sizes("dilation", 1)
        and (values["padding"] == "same" or sizes("padding", 0))
        and (values["output_padding"] == [] or sizes("output_padding", 0))
        and values["padding_mode"] in ("zeros", "reflect", "replicate", "circular")
    )


_LARGEST = 2**40
