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
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from rich.progress import track
from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import DENSE, Choice
from lowrank_pl.layers import LAYER_TYPES, lowered
from lowrank_pl.linalg.root import SHRINKAGE
from lowrank_pl.methods.nonlinear import Rows, refine
from lowrank_pl.metric import Metric
from lowrank_pl.moments import Moments, draw, listening, warn_of_few
from lowrank_pl.samples import Samples, as_call
from lowrank_pl.structures import Dense, Structure
from lowrank_pl.surgery import detached_copy
from lowrank_pl.terminal import terminal
from lowrank_pl.tracing import Call, Following, eager, slow_paths, what_follows

Mode: TypeAlias = Literal["outputs", "asymmetric", "nonlinear"]
# of the mean eigenvalue, at as many vectors as inputs; of 0, 0.1, 1, 3 and 10 the most accurate: ResNet-20, 200 images
DAMPING = 1.0
ROUNDING = 1e-12  # of outputs' squares: what varies less does not vary


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
    _metrics: dict[tuple[str, bool], Metric] = field(default_factory=dict, repr=False)  # which take long to make

    def metrics(self, plan: Plan, centred: bool = False) -> dict[str, Metric]:
        """The metric of what every target is given: of second moments, or of covariances where the bias can move."""
        found = {}
        for c in plan.compressions:
            m = self.fitted.get(c.name)
            if m is not None:
                key = c.name, centred and _moves_bias(c, m)
                found[c.name] = self._metrics[key] = self._metrics.get(key) or m.metric(key[1])
        return found


def collect(model: nn.Module, compressions: Sequence[Compression], samples: Samples) -> Collected:
    """One pass of a copy over the samples. Raises `ValueError` that names the layer and the batch for inputs that are
    not finite, and the batch on which the network does not run; warns where there are fewer vectors than inputs."""
    layers = {c.name: c.layer for c in compressions}
    collected = Collected({}, {})
    number, into = 0, collected.fitted

    def hear(name: str, each: LinearMap, x: Tensor) -> None:
        m = into.setdefault(name, Moments(layers[name]))
        with _named(name, number):
            m.add(draw(x, m.layer, samples.places, seed=number))

    model = detached_copy(model)
    ran: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in model.modules()]
    with _evaluated(model), listening(model, layers, hear):
        for number, is_held, batch in samples.batches():
            into = collected.held if is_held else collected.fitted
            with _seeded(model, number):
                samples.run(model, batch)
            for handle in handles:
                handle.remove()
            if not ran:
                raise ValueError(
                    "Expected argument `forward` to run the network that it is given, a copy, but none of its modules "
                    "was called: give Samples(loader, forward=lambda model, batch: model(...))"
                )
    warn_of_few(collected.fitted)
    return collected


def first_call(model: nn.Module, samples: Samples) -> Call | None:
    """What the network is called with for the first batch; None if `forward` calls its parts alone."""
    _, _, batch = next(samples.batches())
    if samples.forward is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return as_call(model, samples.moved(batch, device))
    calls: list[Call] = []

    def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        raise _Over

    model = detached_copy(model)
    model.register_forward_pre_hook(hear, with_kwargs=True)
    with _evaluated(model), suppress(_Over), _seeded(model, 0):
        samples.run(model, batch)
    return calls[0] if calls else None


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
    - `"nonlinear"`: from there on, to what comes of the outputs behind batch norm and the activation that follow (see
      `lowrank_pl.methods.nonlinear`).
    """
    if mode == "outputs":
        return _outputs(plan, choices, collected or collect(model, plan.compressions, samples))
    fitted = Fitted({}, {})
    dense, current = detached_copy(model), detached_copy(model)
    following = _following(dense, plan, samples) if mode == "nonlinear" else {}
    by_name = {c.name: c for c in plan.compressions}
    console = terminal()
    for name in track(plan.order, "Fitting layers", console=console, transient=True, disable=not console.is_terminal):
        structure, response = _asymmetric(dense, current, by_name[name], choices[name], samples, following.get(name))
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
        if c.name in collected.fitted and not isinstance(structures[c.name].layout, Dense)
    }
    return Fitted(structures, answers)


@torch.no_grad()
def reestimate_batch_norms_(model: nn.Module, samples: Samples) -> None:
    """Running statistics of batch norms as plain averages over the samples, everything else unchanged."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        with _evaluated(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for number, is_held, batch in samples.batches():
                if not is_held:
                    with _seeded(model, number):
                        samples.run(model, batch)
    finally:
        for norm, momentum, old in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not norm.num_batches_tracked:  # it never ran
                for name, value in old.items():
                    norm.get_buffer(name).copy_(value)


def place_(each: LinearMap, structure: Structure) -> None:
    """The weight that a structure makes, and its bias, in the layer's place."""
    each.write_(structure.reconstruct())
    if structure.bias is not None:
        each.module.bias = nn.Parameter(structure.bias.clone(), requires_grad=False)


def can_move_bias(each: LinearMap) -> bool:
    """Whether the layer can get another bias, and one number for each output is what makes up for a mean."""
    is_plain = isinstance(each.module, LAYER_TYPES) and "bias" in each.module._parameters  # neither pruned nor computed
    return is_plain and each.layer.kind != "conv_transpose"


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
    choice = c.settled(choice)
    m, held = (None, None) if choice == DENSE else paired(dense, current, c, samples, rows)
    if m is None:
        return c.problem().structure(choice), None
    metric = m.metric(_moves_bias(c, m))
    target = c.read() if m.cross is None else _target(c, m, metric)
    structure = c.problem(target, metric=metric).structure(choice)
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
    ears = [_Ear(net, c, samples) for net in (dense, current)]
    with ears[0].listening(), ears[1].listening():
        for number, is_held, batch in samples.batches():
            before, now = (ear.heard(number, batch) for ear in ears)
            if len(before) != len(now):
                raise RuntimeError(
                    f"Layer {c.name!r}, batch {number}: called {len(before)} times in the dense network and {len(now)} "
                    "times in the compressed one: its calls cannot be paired. Exclude it, or use reconstruct='outputs'"
                )
            for x, ours in zip(before, now, strict=True):
                m = found.setdefault(is_held, Moments(c.layer))
                if x.shape != ours.shape:
                    raise RuntimeError(
                        f"Layer {c.name!r}, batch {number}: called with {x.shape[1]} vectors in the dense network and "
                        f"with {ours.shape[1]} in the compressed one: its calls cannot be paired. Exclude it, or use "
                        "reconstruct='outputs'"
                    )
                y = None if m.is_long else _answer(c, x)
                with _named(c.name, number):
                    m.add(ours, y)
                if rows is not None and y is not None and not is_held:
                    rows.add(ours, y)
    return found.get(False), found.get(True)


class _Over(BaseException):
    """Ends a run early, past whatever `except Exception` there is in it."""


class _Ear:
    """Hears the rows that a layer is applied to, run by run; each ends when there can be no more calls."""

    def __init__(self, net: nn.Module, c: Compression, samples: Samples) -> None:
        self.net, self.c, self.samples = net, c, samples
        self.number, self.rows = 0, list[Tensor]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        with _evaluated(self.net), listening(self.net, [self.c.name], self._hear):
            yield

    def heard(self, number: int, batch: Any) -> list[Tensor]:
        """Call by call."""
        self.number, self.rows = number, []
        with suppress(_Over), _seeded(self.net, number):
            self.samples.run(self.net, batch)
        return self.rows

    def _hear(self, name: str, each: LinearMap, x: Tensor) -> None:
        self.rows.append(draw(x, self.c.layer, self.samples.places, seed=1000 * self.number + len(self.rows)))
        if self.c.is_called_once:
            raise _Over


def _answer(c: Compression, x: Tensor) -> Tensor:
    """What the dense layer makes of rows `[groups, n, columns]`; without its bias where that cannot move."""
    y = x @ lowered(c.read(), c.layer).to(x).mT
    bias = c.map.bias if can_move_bias(c.map) else None
    return y if bias is None else y + bias.detach().to(y).view(c.layer.groups, 1, -1)


def _target(c: Compression, m: Moments, metric: Metric) -> Tensor:
    """`Cov(y, x) Cov(x)^-1`, drawn towards the layer's own weight: most in directions that were hardly seen, and the
    fewer vectors there were for each input, since errors of what is held out explode otherwise."""
    assert metric.inputs is not None
    own = lowered(c.read(), c.layer).double()
    cross, second = m.of_pairs(_moves_bias(c, m))
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    share = DAMPING * second.shape[-1] / m.count
    found = metric.inputs.raised(share * mean).divide(cross + ((share + SHRINKAGE) * mean)[:, None, None] * own)
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
        energy = m.energy(own)
        return _share(error, energy - (0.0 if m.is_long else float(m.through(own).square().sum())), energy)
    error = m.energy(theta) + (m.squares - 2 * float((theta * m.cross).sum())) / m.count
    if can_move_bias(c.map):
        bias = structure.bias if structure.bias is not None else c.map.bias
        if bias is not None:
            bias = bias.detach().double().view_as(m.mean_y)
            error += float((bias.square() + 2 * bias * (m.through(theta) - m.mean_y)).sum())
    return _share(error, m.squares / m.count - float(m.mean_y.square().sum()), m.squares / m.count)


def _share(error: float, variance: float, energy: float) -> float:
    """Of outputs that do not vary, but for rounding, as a share of that."""
    least = max(energy * ROUNDING, torch.finfo(torch.float64).tiny)
    return max(error, 0.0) / max(variance, least)


class _NotFinite(ValueError):
    """Of a layer and a batch that it names."""


@contextmanager
def _named(name: str, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise _NotFinite(f"Layer {name!r}, batch {number} of the data: {error}") from error


@contextmanager
def _seeded(model: nn.Module, number: int) -> Iterator[None]:
    """One run, on a batch of that number, of which all draw the same random numbers."""
    torch.default_generator.manual_seed(number)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device.index].manual_seed(number)
    try:
        yield
    except _NotFinite:
        raise
    except Exception as error:
        raise ValueError(
            f"Batch {number} of the data: the model does not run on it ({type(error).__name__}: {error})"
        ) from error


def _cuda_devices(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, eagerly and without gradients; then as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), eager(), slow_paths(), torch.random.fork_rng(_cuda_devices(model)):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
