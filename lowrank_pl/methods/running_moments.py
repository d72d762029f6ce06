"""Running averages of what a network's linear maps are given while it trains, for any loop.

moments = RunningMoments()
for step, batch in enumerate(batches):
    if step % 25 == 0:
        moments.start(model, [c.name for c in plan.compressions], seed=step)
    loss(batch).backward()
    moments.stop()
    ...
    distort_(plan, choices, metrics=moments.metrics(plan))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.compression import Plan
from lowrank_pl.layers import lowered_outputs
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric, columns_of
from lowrank_pl.moments import LONGEST, draw, listening
from lowrank_pl.processes import add_up_, is_parallel
from lowrank_pl.tracing import eager

# Of a layer: the sum of `x x^T` over rows, `[groups, n, n]`, or of `x * x`, `[groups, n]`, where n is above 8,192; and
# how many rows it is of. Float64.
Sums: TypeAlias = dict[str, tuple[Tensor, float]]
Rows: TypeAlias = dict[str, list[Tensor]]  # `[groups, m, n]`, call by call


@final
class RunningMoments:
    """Second moments `E[x x^T]` of layers' inputs, and with `gradients` `E[g g^T]` at the outputs of those that are
    modules of their own, as running averages over the batches that are listened to.

    A batch counts `decay` times less with every later one. Of each image or sequence `places` positions are taken. Not
    centred: biases do not move. Of more than 8,192 inputs (or outputs) to a layer only the diagonal is kept.

    Gradients of one batch are divided by one number, so that the mean over layers of their mean square is 1: loss
    scales have no effect, nor has how far training has come, while layers stay comparable. Where a gradient is not
    finite (a loss scaler that looks for its scale), all of the batch are left out.

    In float64 on the network's device, and in checkpoints: `8 * groups * n^2` bytes for each layer of n inputs (a
    convolution's patches) per group, with `gradients` as much for its outputs. In several processes the sums run over
    all.
    """

    def __init__(self, decay: float = 0.9, places: int | None = 10, gradients: bool = False) -> None:
        self.decay, self.places, self.gradients = decay, places, gradients
        self.inputs: Sums = {}
        self.outputs: Sums = {}
        self._metrics: dict[str, Metric] = {}  # of the sums as they are
        self._rows: tuple[Rows, Rows] = {}, {}  # of this batch, as they were drawn
        self._listened: dict[str, LinearMap] = {}
        self._stack: ExitStack | None = None

    @property
    def is_listening(self) -> bool:
        return self._stack is not None

    def start(self, model: nn.Module, names: Collection[str], seed: int, silent: Collection[str] = ()) -> None:
        """Listen to these maps until `stop`; compiled code runs eagerly meanwhile. `seed` says which places are drawn.
        Of `silent` ones no gradients are wanted this time."""
        inputs: Rows = {}
        outputs: Rows = {}
        self._rows = inputs, outputs
        self._listened = {name: each for name, each in find_maps(model).items() if name in names}

        def hear(name: str, each: LinearMap, x: Tensor) -> None:
            # copies: what a layer was given may be written to before this batch ends
            inputs.setdefault(name, []).append(draw(x, each.layer, self.places, seed).clone())

        def hear_gradient(name: str, each: LinearMap, g: Tensor) -> None:
            if self.is_listening and name in inputs and name not in silent:
                g = g if g.dtype in (torch.float32, torch.float64) else g.float()
                generator = torch.Generator().manual_seed(seed)
                outputs.setdefault(name, []).append(lowered_outputs(g, each.layer, self.places, generator).clone())

        self._stack = ExitStack()
        self._stack.enter_context(eager())
        self._stack.enter_context(listening(model, self._listened, hear, hear_gradient if self.gradients else None))

    def stop(self) -> tuple[set[str], bool]:
        """The maps that were heard, and whether gradients were finite; in all processes. Raises `ValueError` that names
        the layer for inputs that are not finite."""
        if self._stack is None:
            return set(), False
        self.give_up()
        inputs, outputs = map(self._summed, self._rows, (False, True))
        self._rows = {}, {}
        for name, (total, _) in inputs.items():
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"Layer {name!r}: expected finite inputs but found NaN or Inf in training: lower the learning "
                    "rate, clip gradients, or look at the data"
                )
        scale = _mean_square(outputs)
        is_finite = scale < float("inf")
        if not is_finite or scale == 0:
            outputs = {}
        self._merge(self.inputs, inputs, 1.0)
        self._merge(self.outputs, outputs, scale)
        self._metrics = {}
        return set(inputs), is_finite

    def give_up(self) -> None:
        """Stop listening in the middle of a batch."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def keep(self, names: Collection[str]) -> None:
        """Forget all other maps."""
        for sums in (self.inputs, self.outputs):
            for name in sums.keys() - set(names):
                del sums[name]

    def metrics(self, plan: Plan) -> dict[str, Metric]:
        """The metric of every target that was heard; the others keep to Frobenius norm."""
        for c in plan.compressions:
            if c.name in self.inputs and c.name not in self._metrics:
                here = c.parameters[0].device
                inputs, outputs = (
                    _root(sums[c.name], here) if c.name in sums else None for sums in (self.inputs, self.outputs)
                )
                self._metrics[c.name] = Metric(c.layer, inputs, outputs)
        return {c.name: self._metrics[c.name] for c in plan.compressions if c.name in self._metrics}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {name: {key: [*value] for key, value in getattr(self, name).items()} for name in ("inputs", "outputs")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("inputs", "outputs"):
            setattr(self, name, {key: (total, count) for key, (total, count) in state[name].items()})
        self._metrics = {}

    @torch.no_grad()
    def _summed(self, rows: Rows, of_outputs: bool) -> Sums:
        """Of all processes. Not while the network runs, which somebody may count the multiply-adds of."""
        sums = {name: _sums(torch.cat(parts, dim=1)) for name, parts in rows.items()}
        if not is_parallel():
            return sums
        device = next(iter(self._listened.values())).parameters[0].device if self._listened else None
        local = [sums[name][1] if name in sums else 0.0 for name in self._listened]
        counts = torch.tensor(local, dtype=torch.float64, device=device)
        add_up_([counts])
        found: Sums = {}
        for (name, each), count in zip(self._listened.items(), counts.tolist(), strict=True):
            if count:
                total = sums[name][0] if name in sums else _zeros(each, of_outputs, device)
                add_up_([total])
                found[name] = total, count
        return found

    def _merge(self, sums: Sums, heard: Sums, scale: float) -> None:
        for name, (total, count) in heard.items():
            total = total / scale
            if name in sums:
                before, weight = sums[name]
                total, count = total + self.decay * before.to(total.device), count + self.decay * weight
            sums[name] = total, count


def _sums(rows: Tensor) -> tuple[Tensor, float]:
    rows = rows.double()
    return rows.square().sum(1) if rows.shape[2] > LONGEST else rows.mT @ rows, rows.shape[1]


def _zeros(each: LinearMap, of_outputs: bool, device: torch.device | None) -> Tensor:
    layer = each.layer
    n = layer.out_channels // layer.groups if of_outputs else columns_of(layer)
    shape = (layer.groups, n) if n > LONGEST else (layer.groups, n, n)
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _mean_square(outputs: Sums) -> float:
    """Of all layers' gradients, each layer counting alike."""
    found = [float(_diagonal(total).mean()) / count for total, count in outputs.values()]
    return sum(found) / len(found) if found else 0.0


def _diagonal(total: Tensor) -> Tensor:
    return total if total.dim() == 2 else total.diagonal(dim1=1, dim2=2)


def _root(sums: tuple[Tensor, float], device: torch.device) -> Root:
    total, count = sums
    mean = total.to(device) / count
    return Root.diagonal(mean) if total.dim() == 2 else Root.of(mean)
