"""Recurrent networks whose matrices are layers of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowrank_pl.layers.ordinary import with_missing

_SETTINGS = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
)  # fmt: skip
State = tuple[Tensor, ...]  # the hidden state, and the cell state of an LSTM


class SplitRecurrent(nn.Module):
    """`nn.LSTM`, `nn.GRU` or `nn.RNN` with its matrices as submodules of the names that they have there,
    `weight_ih_l0`, `weight_hh_l0` and so on, each from `[..., in]` to `[..., out]` and with its own bias.

    Takes and gives what `like` does, whose settings it copies. Computes the input's share of the gates for all time
    steps at once, and loops over the hidden state's. Under autocast everything that it gives has autocast's type, as
    from cuDNN.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def __init__(self, like: nn.RNNBase, matrices: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, getattr(like, name))
        for name in matrix_names(like):
            self.add_module(name, matrices[name])
        self.train(like.training)

    @staticmethod
    def of(rnn: nn.RNNBase, projections: Mapping[str, nn.Module]) -> SplitRecurrent:
        """With the given matrices, and linear layers with copies of the network's own weights for the others."""
        dense = {
            name: (getattr(rnn, name), getattr(rnn, name.replace("weight", "bias"), None)) for name in matrix_names(rnn)
        }
        return SplitRecurrent(rnn, with_missing(projections, dense))

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        if not isinstance(input, PackedSequence):
            return self._layers(input, hx, None)
        sizes = input.batch_sizes.tolist()
        x, last = self._layers(input.data, _reorder(hx, input.sorted_indices), sizes)
        return PackedSequence(x, *input[1:]), _reorder(last, input.unsorted_indices)

    def _layers(self, x: Tensor, hx: Any, sizes: list[int] | None) -> tuple[Tensor, Any]:
        """The output and the last states; `sizes`, of packed sequences, are how many take part in each time step."""
        time = 1 if self.batch_first and x.dim() == 3 else 0
        batch = x.shape[:time] + x.shape[time + 1 : -1] if sizes is None else sizes[:1]
        initial = self._initial(hx, x, batch)
        last: list[State] = []
        for layer in range(self.num_layers):
            directions = []
            for suffix in _suffixes(self, layer):
                gates: Tensor = self.get_submodule(f"weight_ih_{suffix}")(x)
                steps = gates.unbind(time) if sizes is None else gates.split(sizes)
                state = tuple(each[len(last)].to(gates.dtype) for each in initial)
                outputs, state = self._direction(suffix, steps, state, sizes is not None)
                directions.append(torch.stack(outputs, time) if sizes is None else torch.cat(outputs))
                last.append(state)
            x = torch.cat(directions, dim=-1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        finals = tuple(torch.stack(each) for each in zip(*last, strict=True))
        return x, finals if self.mode == "LSTM" else finals[0]

    def _initial(self, hx: Any, x: Tensor, batch: Sequence[int]) -> State:
        """Each `[layers directions, *batch, features]`: as given, or zeros."""
        several = self.num_layers * (1 + self.bidirectional)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        shapes = [(several, *batch, size) for size in sizes]
        if hx is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        given: State = tuple(hx) if self.mode == "LSTM" else (hx,)
        if [tuple(each.shape) for each in given] != shapes:
            raise ValueError(f"Expected `hx` of shape {shapes} but got {[tuple(each.shape) for each in given]}")
        return given

    def _direction(
        self, suffix: str, steps: tuple[Tensor, ...], state: State, packed: bool
    ) -> tuple[list[Tensor], State]:
        """The outputs and the last state of one direction of one layer.

        Packed sequences come longest first, so that a step concerns the first so many: those that have ended keep
        their state, and backwards those that have not begun keep the initial one.
        """
        backwards = suffix.endswith("_reverse")
        outputs = []
        for gates in reversed(steps) if backwards else steps:
            n = gates.shape[0]
            if packed and n < state[0].shape[0]:
                new = self._step(suffix, gates, tuple(each[:n] for each in state))
                outputs.append(new[0])
                state = tuple(torch.cat([a, b[n:]]) for a, b in zip(new, state, strict=True))
            else:
                state = self._step(suffix, gates, state)
                outputs.append(state[0])
        return outputs[::-1] if backwards else outputs, state

    def _step(self, suffix: str, gates: Tensor, state: State) -> State:
        """The next state, from the input's share of the gates (the equations in PyTorch's documentation)."""
        hidden = state[0]
        more: Tensor = self.get_submodule(f"weight_hh_{suffix}")(hidden)
        if self.mode == "LSTM":
            i, f, g, o = (gates + more).chunk(4, dim=-1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            return self.get_submodule(f"weight_hr_{suffix}")(hidden) if self.proj_size else hidden, cell
        if self.mode == "GRU":
            (r, z, n), (r_more, z_more, n_more) = gates.chunk(3, dim=-1), more.chunk(3, dim=-1)
            n = (n + (r + r_more).sigmoid() * n_more).tanh()
            return (n + (z + z_more).sigmoid() * (hidden - n),)
        return ((gates + more).tanh() if self.mode == "RNN_TANH" else (gates + more).relu(),)

    def flatten_parameters(self) -> None:
        """Nothing: there is no memory that cuDNN would want in one piece."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)


def _reorder(hx: Any, order: Tensor | None) -> Any:
    """A state with its sequences in another order."""
    if hx is None or order is None:
        return hx
    return hx.index_select(1, order) if isinstance(hx, Tensor) else tuple(each.index_select(1, order) for each in hx)


def _suffixes(rnn: nn.RNNBase | SplitRecurrent, layer: int) -> list[str]:
    return [f"l{layer}", f"l{layer}_reverse"][: 1 + rnn.bidirectional]


def matrix_names(rnn: nn.RNNBase) -> list[str]:
    kinds = ("ih", "hh", "hr") if rnn.proj_size else ("ih", "hh")
    suffixes = [suffix for layer in range(rnn.num_layers) for suffix in _suffixes(rnn, layer)]
    return [f"weight_{kind}_{suffix}" for suffix in suffixes for kind in kinds]


def recurrent_inputs(rnn: nn.RNNBase, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """For each matrix as many vectors as it is applied to in a call, `[..., in]`, with the axes that the input has:
    the input itself, and in place of hidden states numbers between -1 and 1 (always the same)."""
    given = args[0] if args else kwargs["input"]
    x: Tensor = given.data if isinstance(given, PackedSequence) else given
    return {
        name: x if name.startswith("weight_ih_l0") else _stand_in(x, getattr(rnn, name).shape[1])
        for name in matrix_names(rnn)
    }


def _stand_in(x: Tensor, features: int) -> Tensor:
    """`[..., features]`; of full rank, as the cosines of squares follow no linear rule."""
    shape = (*x.shape[:-1], features)
    numbers = torch.arange(x[..., 0].numel() * features, device=x.device)
    return numbers.square().double().cos().view(shape).to(x.dtype)
