"""Reconstruction: factors fitted to what layers answer on real inputs, without training, for any network.

samples = Samples(loader, count=3000)
trace = record(model, images)
plan = make_plan(model, "svd", CostBudget("macs", 0.5), trace=trace)
problems = plan.problems(collect(model, plan.compressions, samples).metrics(plan, centred=True))
fitted = reconstruct(model, plan, plan.choose_ranks(problems), samples, "asymmetric")
extracted = extract(model, plan, fitted.structures, notes={}, trace=trace)

Zhang, Zou, He & Sun (TPAMI 2016), 3.1 to 3.3; Yu, Liu, Wang & Tao (CVPR 2017), eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from rich.progress import track
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import DENSE, Choice
from lowrank_pl.layers import LAYER_TYPES, lowered
from lowrank_pl.linalg import Root
from lowrank_pl.linalg.root import SHRINKAGE
from lowrank_pl.methods.nonlinear import Rows, refine
from lowrank_pl.metric import Metric
from lowrank_pl.moments import Moments, draw, listening, warn_of_few
from lowrank_pl.samples import Samples
from lowrank_pl.structures import Dense, Structure
from lowrank_pl.surgery import detached_copy
from lowrank_pl.terminal import terminal
from lowrank_pl.tracing import Following, eager, what_follows

Mode: TypeAlias = Literal["outputs", "asymmetric", "nonlinear"]


@dataclass(frozen=True)
class Response:
    """How far a layer's outputs are from the dense network's, `E||y' - y||^2 / E||y - mean(y)||^2`: on the samples, and
    on those held back (None without any). `samples` are the vectors that it was fitted to."""

    samples: int
    fitted: float
    held_out: float | None


@dataclass(frozen=True)
class Fitted:
    """Factors by layer, and what their outputs are like."""

    structures: dict[str, Structure]
    responses: dict[str, Response]


@dataclass(frozen=True)
class Collected:
    """Moments of what every target is given, on the samples and on those held back. Targets whose inputs nobody knows
    (parameters that others multiply by) have none."""

    fitted: dict[str, Moments]
    held: dict[str, Moments]

    def metrics(self, plan: Plan, centred: bool = False) -> dict[str, Metric]:
        """The metric of what every target is given: of second moments, or of covariances where the bias can move."""
        maps = {c.name: c for c in plan.compressions}
        return {name: m.metric(centred and _moves_bias(maps[name], m)) for name, m in self.fitted.items()}


def collect(model: nn.Module, compressions: Sequence[Compression], samples: Samples) -> Collected:
    """One pass over the samples. Raises `ValueError` that names the layer and the batch for inputs that are not finite;
    warns where there are fewer vectors than inputs."""
    layers = {c.name: c.layer for c in compressions}
    collected = Collected({}, {})

    def hear(into: dict[str, Moments], number: int, name: str, each: LinearMap, x: Tensor) -> None:
        m = into.setdefault(name, Moments(layers[name]))
        with _named(name, number):
            m.add(draw(x, m.layer, samples.places, seed=number))

    with _evaluated(model):
        for number, is_held, batch in samples.batches():
            into = collected.held if is_held else collected.fitted
            with listening(model, layers, partial(hear, into, number)):
                samples.run(model, batch)
    warn_of_few(collected.fitted)
    return collected


def reconstruct(
    model: nn.Module,
    plan: Plan,
    choices: Mapping[str, Choice],
    samples: Samples,
    mode: Mode = "outputs",
    collected: Collected | None = None,
) -> Fitted:
    """Factors of these choices, fitted to the dense network's outputs on the samples; the model is left as it is.

    - `"outputs"`: nearest in the covariance of the layer's inputs, the bias moved so that means stay (output PCA); of
      what has been `collected`, or of a pass over the samples.
    - `"asymmetric"`: layer by layer in the order of running, from the inputs that the network compressed so far gives
      to the outputs of the dense one. In residual networks the inputs of both branches are those.
    """
    if mode == "outputs":
        return _outputs(plan, choices, collected or collect(model, plan.compressions, samples))
    fitted = Fitted({}, {})
    current = detached_copy(model)
    following = _following(model, plan, samples) if mode == "nonlinear" else {}
    by_name = {c.name: c for c in plan.compressions}
    console = terminal()
    for name in track(plan.order, "Fitting layers", console=console, transient=True, disable=not console.is_terminal):
        structure, response = _asymmetric(model, current, by_name[name], choices[name], samples, following.get(name))
        fitted.structures[name] = structure
        if response is not None:
            fitted.responses[name] = response
        place_(find_maps(current)[name], structure)
    return fitted


def with_responses(plan: Plan, structures: dict[str, Structure], collected: Collected) -> Fitted:
    """What the outputs of these structures are like."""
    answers = {
        c.name: _answers(c, structures[c.name], collected.fitted[c.name], collected.held.get(c.name))
        for c in plan.compressions
        if c.name in collected.fitted
    }
    return Fitted(structures, answers)


@torch.no_grad()
def reestimate_batch_norms_(model: nn.Module, samples: Samples) -> None:
    """Running statistics of batch norms as plain averages over the samples, everything else unchanged."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with _evaluated(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for _, is_held, batch in samples.batches():
            if not is_held:
                samples.run(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def place_(each: LinearMap, structure: Structure) -> None:
    """The weight that a structure makes, and its bias, in the layer's place."""
    each.write_(structure.reconstruct())
    if structure.bias is not None:
        each.module.bias = nn.Parameter(structure.bias.clone(), requires_grad=False)


def can_move_bias(each: LinearMap) -> bool:
    """Whether the layer can get another bias, and one number for each output is what makes up for a mean."""
    return isinstance(each.module, LAYER_TYPES) and each.layer.kind != "conv_transpose"


def _outputs(plan: Plan, choices: Mapping[str, Choice], collected: Collected) -> Fitted:
    metrics, structures = collected.metrics(plan, centred=True), {}
    for c in plan.compressions:
        m, choice = collected.fitted.get(c.name), c.settled(choices[c.name])
        structure = c.problem(metric=metrics.get(c.name)).structure(choice)
        structures[c.name] = structure if m is None else _moved(c, structure, m)
    return with_responses(plan, structures, collected)


def _asymmetric(
    dense: nn.Module,
    current: nn.Module,
    c: Compression,
    choice: Choice,
    samples: Samples,
    following: Following | None = None,
) -> tuple[Structure, Response | None]:
    rows = None if following is None else Rows()
    m, held = paired(dense, current, c, samples, rows)
    choice = c.settled(choice)
    if m is None or choice == DENSE:
        return c.problem().structure(choice), None
    warn_of_few({c.name: m})
    target = c.read() if m.cross is None else _target(c, m)
    structure = c.problem(target, metric=m.metric(_moves_bias(c, m))).structure(choice)
    structure = _moved(c, structure, m)
    if following is not None and rows is not None and structure.bias is not None:
        structure = refine(structure, c.layer, rows, following)
    return structure, _answers(c, structure, m, held)


def _following(model: nn.Module, plan: Plan, samples: Samples) -> dict[str, Following]:
    """What follows every target, as the first batch shows."""
    _, _, batch = next(samples.batches())
    with _evaluated(model):
        return what_follows(model, plan.order, lambda: samples.run(model, batch))


def paired(
    dense: nn.Module, current: nn.Module, c: Compression, samples: Samples, rows: Rows | None = None
) -> tuple[Moments | None, Moments | None]:
    """Moments of what one layer is given in the network compressed so far, and of what it answers in the dense one; on
    the samples and on those held back. None where its inputs are not known."""
    found: dict[bool, Moments] = {}
    with _evaluated(dense), _evaluated(current):
        for number, is_held, batch in samples.batches():
            before, now = (_heard(net, c, samples, number, batch) for net in (dense, current))
            if len(before) != len(now):
                raise RuntimeError(
                    f"Layer {c.name!r}, batch {number}: called {len(before)} times in the dense network and {len(now)} "
                    "times in the compressed one: its calls cannot be paired. Exclude it, or use reconstruct='outputs'"
                )
            m = found.setdefault(is_held, Moments(c.layer)) if before else None
            for x, ours in zip(before, now, strict=True):
                assert m is not None
                y = None if m.is_long else _answer(c, x)
                with _named(c.name, number):
                    m.add(ours, y)
                if rows is not None and y is not None and not is_held:
                    rows.add(ours, y)
    return found.get(False), found.get(True)


class _Heard(BaseException):
    """Ends a run early, past whatever `except Exception` there is in it."""


def _heard(net: nn.Module, c: Compression, samples: Samples, number: int, batch: Any) -> list[Tensor]:
    """The rows that a layer is applied to in one run, call by call, which ends when there can be no more calls."""
    rows: list[Tensor] = []

    def hear(name: str, each: LinearMap, x: Tensor) -> None:
        rows.append(draw(x, c.layer, samples.places, seed=1000 * number + len(rows)))
        if c.is_called_once:
            raise _Heard

    with listening(net, [c.name], hear), suppress(_Heard):
        samples.run(net, batch)
    return rows


def _answer(c: Compression, x: Tensor) -> Tensor:
    """What the dense layer makes of rows `[groups, n, columns]`; without its bias where that cannot move."""
    y = x @ lowered(c.read(), c.layer).to(x).mT
    bias = c.map.bias if can_move_bias(c.map) else None
    return y if bias is None else y + bias.detach().to(y).view(c.layer.groups, 1, -1)


def _target(c: Compression, m: Moments) -> Tensor:
    """`Cov(y, x) Cov(x)^-1`, and in directions that were hardly seen the layer's own weight."""
    own = lowered(c.read(), c.layer).double()
    cross, second = m.of_pairs(_moves_bias(c, m))
    share = SHRINKAGE * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    found = Root.of(second).divide(cross + share * own)
    stored = found.mT if c.layer.kind == "conv_transpose" else found
    return stored.reshape(c.layer.stored_shape).to(c.read().dtype)


def _moves_bias(c: Compression, m: Moments) -> bool:
    return can_move_bias(c.map) and not m.is_long


def _moved(c: Compression, structure: Structure, m: Moments) -> Structure:
    """With the bias that keeps the mean of the outputs."""
    if not _moves_bias(c, m) or isinstance(structure.layout, Dense):
        return structure
    theta, own = (lowered(w, c.layer).double() for w in (structure.reconstruct(), c.read()))
    if m.first_y is None:
        shift = ((own - theta) @ m.mean.unsqueeze(2)).flatten()
        bias = shift if c.map.bias is None else c.map.bias.detach().double() + shift
    else:
        bias = (m.mean_y - (theta @ m.mean.unsqueeze(2)).squeeze(2)).flatten()
    return replace(structure, bias=bias.to(c.read().dtype))


def _answers(c: Compression, structure: Structure, m: Moments, held: Moments | None) -> Response:
    held_out = None if held is None else _error(c, structure, held)
    return Response(round(m.count), _error(c, structure, m), held_out)


def _error(c: Compression, structure: Structure, m: Moments) -> float:
    """Of the outputs, as a share of their variance; of long inputs as a share of their squared norm."""
    assert m.second is not None
    theta, own = (lowered(w, c.layer).double() for w in (structure.reconstruct(), c.read()))
    if m.cross is None:
        difference, shift = own - theta, torch.zeros_like(own[:, :, 0])
        if structure.bias is not None:
            old = 0.0 if c.map.bias is None else c.map.bias.detach().double()
            shift = (old - structure.bias.double()).view_as(shift)
        error = m.energy(difference) + float((shift.square() + 2 * shift * m.through(difference)).sum())
        return error / max(m.energy(own) - (float(m.through(own).square().sum()) if not m.is_long else 0.0), 1e-300)
    error = m.energy(theta) + (m.squares - 2 * float((theta * m.cross).sum())) / m.count
    if can_move_bias(c.map):
        bias = structure.bias if structure.bias is not None else c.map.bias
        if bias is not None:
            bias = bias.detach().double().view_as(m.mean_y)
            error += float((bias.square() + 2 * bias * (m.through(theta) - m.mean_y)).sum())
    return max(error, 0.0) / max(m.squares / m.count - float(m.mean_y.square().sum()), 1e-300)


@contextmanager
def _named(name: str, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Layer {name!r}, batch {number} of the data: {error}") from error


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, eagerly and without gradients; then as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), eager(), torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
