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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.compression import Compression, Plan
from lowrank_pl.decompositions import DENSE, Choice
from lowrank_pl.layers import lowered
from lowrank_pl.linalg.root import SHRINKAGE
from lowrank_pl.methods.collecting import Collected, can_move_bias, collect, moves_bias
from lowrank_pl.methods.nonlinear import Rows, refine
from lowrank_pl.methods.responses import Fitted, Response, response_of, with_responses
from lowrank_pl.methods.running import Over, evaluated, named, seeded
from lowrank_pl.metric import Metric
from lowrank_pl.moments import Moments, draw, listening
from lowrank_pl.samples import Samples
from lowrank_pl.structures import Dense, Structure
from lowrank_pl.surgery import detached_copy
from lowrank_pl.terminal import progress
from lowrank_pl.tracing import Following, what_follows

Mode: TypeAlias = Literal["outputs", "asymmetric", "nonlinear"]
# of the mean eigenvalue, at as many vectors as inputs; of 0, 0.1, 1, 3 and 10 the most accurate: ResNet-20, 200 images
DAMPING = 1.0


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
    for name in progress(plan.order, "Fitting layers"):
        structure, response = _asymmetric(dense, current, by_name[name], choices[name], samples, following.get(name))
        fitted.structures[name] = structure
        if response is not None:
            fitted.responses[name] = response
        place_(find_maps(current)[name], structure)
    return fitted


def place_(each: LinearMap, structure: Structure) -> None:
    """The weight that a structure makes, and its bias, in the layer's place."""
    each.write_(structure.reconstruct())
    if structure.bias is not None:
        each.module.bias = nn.Parameter(structure.bias.clone(), requires_grad=False)


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
    metric = m.metric(moves_bias(c, m))
    target = c.read() if m.cross is None else _target(c, m, metric)
    structure = c.problem(target, metric=metric).structure(choice)
    structure = _moved(c, structure, m)
    if following is not None and rows is not None and structure.bias is not None:
        structure = refine(structure, c.layer, rows, following)
    return structure, response_of(c, structure, m, held)


def _following(model: nn.Module, plan: Plan, samples: Samples) -> dict[str, Following]:
    """What follows every target, as the first batch shows."""
    _, _, batch = next(samples.batches())
    with evaluated(model):
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
                with named(c.name, number):
                    m.add(ours, y)
                if rows is not None and y is not None and not is_held:
                    rows.add(ours, y)
    return found.get(False), found.get(True)


class _Ear:
    """Hears the rows that a layer is applied to, run by run; each ends when there can be no more calls."""

    def __init__(self, net: nn.Module, c: Compression, samples: Samples) -> None:
        self.net, self.c, self.samples = net, c, samples
        self.number, self.rows = 0, list[Tensor]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        with evaluated(self.net), listening(self.net, [self.c.name], self._hear):
            yield

    def heard(self, number: int, batch: Any) -> list[Tensor]:
        """Call by call."""
        self.number, self.rows = number, []
        with suppress(Over), seeded(self.net, number):
            self.samples.run(self.net, batch)
        return self.rows

    def _hear(self, name: str, each: LinearMap, x: Tensor) -> None:
        self.rows.append(draw(x, self.c.layer, self.samples.places, seed=1000 * self.number + len(self.rows)))
        if self.c.is_called_once:
            raise Over


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
    cross, second = m.of_pairs(moves_bias(c, m))
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    share = DAMPING * second.shape[-1] / m.count
    found = metric.inputs.raised(share * mean).divide(cross + ((share + SHRINKAGE) * mean)[:, None, None] * own)
    stored = found.mT if c.layer.kind == "conv_transpose" else found
    return stored.reshape(c.layer.stored_shape).to(c.read().dtype)


def _moved(c: Compression, structure: Structure, m: Moments) -> Structure:
    """With the bias that keeps the mean of the outputs."""
    if not moves_bias(c, m) or isinstance(structure.layout, Dense):
        return structure
    theta, own = (lowered(w, c.layer).double() for w in (structure.reconstruct(), c.read()))
    if m.first_y is None:
        shift = ((own - theta) @ m.mean.unsqueeze(2)).flatten()
        bias = shift if c.map.bias is None else c.map.bias.detach().double() + shift
    else:
        bias = (m.mean_y - (theta @ m.mean.unsqueeze(2)).squeeze(2)).flatten()
    return replace(structure, bias=bias.to(c.read().dtype))
