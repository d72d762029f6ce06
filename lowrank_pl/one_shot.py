"""Compression without training: a network in, a smaller copy out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from lowrank_pl.adapters import find_maps
from lowrank_pl.checks import check_among
from lowrank_pl.compression import Plan
from lowrank_pl.decompositions import Choice
from lowrank_pl.extraction import RECORD, difference, extract
from lowrank_pl.methods.batch_norms import reestimate_batch_norms_
from lowrank_pl.methods.collecting import collect, first_call
from lowrank_pl.methods.from_scratch import check_rules, random_structures
from lowrank_pl.methods.gradients import check_loss, with_gradients
from lowrank_pl.methods.reconstruct import Mode, place_
from lowrank_pl.methods.reconstruct import reconstruct as fit
from lowrank_pl.methods.responses import Fitted, with_responses
from lowrank_pl.norms import insert_norms_
from lowrank_pl.planning import MethodChoice, RankChoice, make_plan, rules_of
from lowrank_pl.ranks import CostBudget, GreedyEnergy
from lowrank_pl.samples import HELD_OUT, Samples, by_keywords
from lowrank_pl.structures import Structure
from lowrank_pl.surgery import detached_copy
from lowrank_pl.targets import Targets
from lowrank_pl.tracing import Trace, count_inputs, record

_UNHEARD = "what it is given is not known: nearest to the weights"

MetricName: TypeAlias = Literal["weights", "inputs", "inputs_and_gradients"]


@torch.inference_mode(False)
def compress(
    model: nn.Module,
    method: MethodChoice = "tiled_svd",
    rank: RankChoice | None = None,
    targets: Targets | None = None,
    example_input: Any = None,
    batch_size: int | None = None,
    data: Iterable[Any] | Samples | None = None,
    reconstruct: Mode | None = None,
    metric: MetricName | None = None,
    recalibrate_bn: bool = False,
) -> nn.Module:
    """A deep copy of `model` in which every target is a module of factors; `model` itself is unchanged.

    `method`, `rank` (default `CompressionRatio(2.0)`) and `targets` as for `DeepTwist`. With `example_input` (a tensor,
    a tuple of arguments, a mapping with names of arguments, or `lowrank_pl.Call(kwargs=...)`, of `batch_size` inputs
    where its tensors do not tell) the model runs once: layers that it never calls stay dense, "first" and "last" follow
    the order of running, and the copy is verified on the layers' real inputs. Without it the order of registration
    counts, parameters of modules that are no layers stay dense, and nobody knows of weights that other modules read.

    `data`, a loader or a list of batches without or with labels, or `Samples(loader, ...)`, makes it look at what flows
    through the layers; its first batch serves as `example_input`. Ranks and factors are then nearest in the sense of
    the layers' inputs, `metric="inputs"`, also of the gradients of a loss at their outputs, `"inputs_and_gradients"`
    (with `Samples(loader, loss=...)`), or of the weights. With `reconstruct` factors and biases are fitted to the
    outputs of the dense network (see `lowrank_pl.methods.reconstruct`): `"outputs"`, on its own inputs; `"asymmetric"`,
    on those that the network compressed so far makes, a pass over the data for each layer; `metric` is that of the
    ranks alone then. With `recalibrate_bn` batch norms are re-estimated over the data afterwards. How far outputs are
    off is in the report of `summarize`.

    Layers that an earlier call has compressed stay as they are. Raises `RuntimeError` where the copy, as a whole or one
    of its layers, does not compute what the model with projected weights does.
    """
    example_input = by_keywords(model, example_input)
    _check_weights(model)
    samples, own_input = _samples(data, reconstruct, metric, recalibrate_bn), example_input is not None
    if samples is not None and example_input is None and isinstance(model, nn.Module):
        example_input = first_call(model, samples)
    trace = _record(model, example_input, batch_size, None if own_input else samples)
    plan = make_plan(model, method, rank, targets, trace)
    if not plan.compressions and isinstance(rank, (CostBudget, GreedyEnergy)):
        words = "; ".join(dict.fromkeys(plan.dense.values())) or "it has no linear layer or convolution"
        raise ValueError(f"A budget of {rank.ratio:g} cannot be reached: no layer takes part ({words})")
    unheard: set[str] = set()
    if samples is None:
        problems = plan.problems()
        choices = plan.choose_ranks(problems)
        fitted = Fitted(plan.factor(choices, problems), {})
    else:
        choices, fitted, unheard = _fit(model, plan, samples, reconstruct, metric or "inputs")
    extracted = _extracted(model, plan, choices, fitted, trace, example_input, unheard)
    if recalibrate_bn and samples is not None:
        reestimate_batch_norms_(extracted, samples)
    return extracted


def _check_weights(model: nn.Module) -> None:
    """Raise `ValueError` for weights without numbers."""
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"Expected argument `model` with weights, but {name!r} is on the device 'meta'")


def from_scratch(
    model: nn.Module,
    method: MethodChoice,
    rank: RankChoice | None = None,
    targets: Targets | None = None,
    example_input: Any = None,
    batch_size: int | None = None,
    norm_between: bool = False,
) -> nn.Module:
    """A deep copy of a freshly made `model`, in which every target is a module of random factors, to be trained.

    Arguments as for `compress`; ranks must follow from shapes. Such a layer passes on variances, forward and backward,
    as the dense one does with the weight that it has been initialized with: see
    `lowrank_pl.methods.from_scratch.factor_variances`. With `norm_between` batch norms stand between the factors of
    convolutions (Tai, Xiao, Zhang, Wang & E, ICLR 2016), which `fold_norms_` takes away after training. Layers that
    start at zero stay dense.
    """
    check_among("norm_between", norm_between, (True, False))
    example_input = by_keywords(model, example_input)
    check_rules(rules_of(rank))
    trace = _record(model, example_input, batch_size, None)
    plan = make_plan(model, method, rank, targets, trace)
    choices = plan.choose_ranks()
    structures = random_structures(plan, choices, norm_between)
    made = _extracted(model, plan, choices, Fitted(structures, {}), trace, example_input)
    if norm_between:
        insert_norms_(made, structures)
    return made


def _extracted(
    model: nn.Module,
    plan: Plan,
    choices: Mapping[str, Choice],
    fitted: Fitted,
    trace: Trace | None,
    example_input: Any,
    unheard: Collection[str] = (),
) -> nn.Module:
    """The copy with factors. Raises `RuntimeError` where it does not compute what the projected model does."""
    notes = {c.name: c.note(choices[c.name]) or (_UNHEARD if c.name in unheard else "") for c in plan.compressions}
    extracted = extract(model, plan, fitted.structures, notes, trace)
    getattr(extracted, RECORD)["responses"] = {name: asdict(each) for name, each in fitted.responses.items()}
    if example_input is not None:
        problem = difference(_projected(model, fitted.structures), extracted, example_input)
        if problem is not None:
            raise RuntimeError(f"The compressed network is not the projected one: {problem}")
    return extracted


def _fit(
    model: nn.Module, plan: Plan, samples: Samples, reconstruct: Mode | None, metric: MetricName
) -> tuple[dict[str, Choice], Fitted, set[str]]:
    """Ranks and factors by the data, and the layers of which it says nothing."""
    collected = collect(model, plan.compressions, samples)
    metrics = None if metric == "weights" else collected.metrics(plan, reconstruct is not None)
    if metric == "inputs_and_gradients" and metrics is not None:
        metrics = with_gradients(metrics, model, plan.compressions, samples)
    problems = plan.problems(metrics)
    choices = plan.choose_ranks(problems)
    if reconstruct is None:
        fitted = with_responses(plan, plan.factor(choices, problems), collected)
    else:
        fitted = fit(model, plan, choices, samples, reconstruct, collected)
    if fitted.responses and not collected.held:
        warnings.warn(
            f"`data` holds fewer than {HELD_OUT} batches, and none was held back: response errors are of the samples "
            "that factors are fitted to, and too small",
            stacklevel=4,
        )
    return choices, fitted, {c.name for c in plan.compressions} - collected.fitted.keys()


def _record(model: nn.Module, example_input: Any, batch_size: int | None, samples: Samples | None) -> Trace | None:
    """What the example, if any, shows, which is the samples' first batch where these are given."""
    if example_input is None:
        return None
    batch = count_inputs(example_input, batch_size)
    try:
        return record(model, example_input, batch, training=True)
    except Exception as error:
        given, hint = "argument `example_input`" if samples is None else "the first batch of `data`", ""
        if samples is not None and samples.forward is None:
            hint = ": give Samples(loader, forward=lambda model, batch: ...) to say how it is called"
        raise ValueError(f"The model does not run on {given} ({type(error).__name__}: {error}){hint}") from error


def _samples(
    data: Iterable[Any] | Samples | None, reconstruct: str | None, metric: str | None, recalibrate_bn: bool
) -> Samples | None:
    if reconstruct is not None:
        check_among("reconstruct", reconstruct, (*get_args(Mode), None))
    if metric is not None:
        check_among("metric", metric, get_args(MetricName))
    if data is not None:
        samples = Samples.of(data)
        if metric == "inputs_and_gradients":
            check_loss(samples)
        return samples
    asked = [f"reconstruct={reconstruct!r}"] * (reconstruct is not None) + [f"metric={metric!r}"] * (
        metric not in (None, "weights")
    )
    asked += ["recalibrate_bn=True"] * recalibrate_bn
    if asked:
        raise ValueError(f"Expected argument `data`, a loader or a list of batches, beside {' and '.join(asked)}")
    return None


def _projected(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of the model with the weights that the structures make."""
    projected = detached_copy(model)
    maps = find_maps(projected)
    for name, structure in structures.items():
        place_(maps[name], structure)
    return projected
