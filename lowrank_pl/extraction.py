"""From projected weights to a plain module, verified layer by layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.compression import Plan
from lowrank_pl.planning import MethodChoice, RankChoice, make_plan
from lowrank_pl.structures import Dense, Structure
from lowrank_pl.surgery import Trace, count_inputs, detached_copy, find_layers, record, replace_layers
from lowrank_pl.targets import Targets
from lowrank_pl.timing import median_ms

TOLERANCE = 1e-4
RECORD = "lowrank_pl_record"  # the attribute of an extracted module that says what was done to it


def compress(
    model: nn.Module,
    method: MethodChoice = "tiled_svd",
    rank: RankChoice | None = None,
    targets: Targets | None = None,
    example_input: Any = None,
    batch_size: int | None = None,
) -> nn.Module:
    """A deep copy of `model` in which every target is a module of factors; `model` itself is unchanged.

    `method`, `rank` (default `CompressionRatio(2.0)`) and `targets` as for `DeepTwist`. With `example_input` (a tensor,
    a tuple of arguments, or `lowrank_pl.surgery.Call(kwargs=...)`, of `batch_size` inputs where its tensors do not
    tell) the model runs once: layers that it never calls stay dense, "first" and "last" follow the order of running,
    and the copy is verified on the layers' real inputs. Without it the order of registration counts, and a layer whose
    weight another module reads directly is recognized only inside `nn.MultiheadAttention`.
    """
    batch = None if example_input is None else count_inputs(example_input, batch_size)
    try:
        trace = None if example_input is None else record(model, example_input, batch)
    except Exception as error:
        raise ValueError(f"The model does not run on argument `example_input`: {error}") from error
    plan = make_plan(model, method, rank, targets, trace)
    problems = plan.problems()
    choices = plan.choose_ranks(problems)
    notes = {c.name: c.note(choices[c.name]) for c in plan.compressions}
    return extract(model, plan, plan.factor(choices, problems), notes, trace)


def extract(
    model: nn.Module,
    plan: Plan,
    structures: Mapping[str, Structure],
    notes: Mapping[str, str],
    trace: Trace | None = None,
    shared: tuple[Any, ...] = (),
    in_memory: bool = False,
) -> nn.Module:
    """A deep copy of `model` with a module of factors for every structure that is not dense.

    Each is compared in float64 with the layer that it replaces, on inputs from the trace (on random ones where there
    are none): `RuntimeError` with the layer's name if outputs differ by more than 1e-4. The layer runs with the
    projected weight, or, with `in_memory`, with the one that it holds, which has been projected. A record of what was
    done, in plain types, with `notes` on the targets, is left on the copy for `save_compressed` and `summarize`. A
    structure that can compute in several forms takes the one that is faster on those inputs. Objects in `shared`, such
    as a trainer, are not copied.
    """
    extracted = detached_copy(model, shared)
    layers = find_layers(extracted)
    replacements: dict[nn.Module, nn.Module] = {}
    entries: dict[str, Any] = {}
    notes = {**plan.dense, **notes}
    for c in plan.compressions:
        structure = structures[c.name]
        if isinstance(structure.layout, Dense):
            continue
        layer = layers[c.name]
        seen = trace is not None and c.name in trace.samples
        x = _sample(layer, c.layer.kernel, trace.samples[c.name] if trace is not None and seen else None)
        forms = [structure.with_layout(layout) for layout in structure.layout.forms()]
        modules = [form.to_module(layer.bias).train(layer.training) for form in forms]  # type: ignore[arg-type]
        for module in modules:
            module.requires_grad_(any(p.requires_grad for p in layer.parameters()))
            _verify(c.name, layer, structure, in_memory, module, x)
        fastest = _fastest(modules, x) if seen and len(modules) > 1 else 0
        layout = forms[fastest].layout
        notes[c.name] = "; ".join(filter(None, [notes.get(c.name, ""), layout.note]))
        replacements[layer] = modules[fastest]
        entries[c.name] = {"structure": layout.to_dict(), "replaces": c.layer.to_dict()}
    if not entries:
        warnings.warn("No layer was compressed: all of them stay dense. See the table of reasons.", stacklevel=2)
    extracted = replace_layers(extracted, replacements)
    setattr(extracted, RECORD, {"layers": entries, "notes": notes})
    return extracted


def extracted_part(whole: nn.Module, name: str) -> nn.Module:
    """A submodule with its share of the record, under its own names."""
    if not name:
        return whole
    record, part = getattr(whole, RECORD, {"layers": {}, "notes": {}}), whole.get_submodule(name)
    shares = {
        key: {n.removeprefix(f"{name}."): value for n, value in entries.items() if n.startswith(f"{name}.")}
        for key, entries in record.items()
    }
    setattr(part, RECORD, shares)
    return part


def _sample(layer: nn.Module, kernel: tuple[int, ...], recorded: Tensor | None) -> Tensor:
    """Recorded inputs, or, where there are none or not finite ones, random ones just large enough for the kernel."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if recorded is not None and torch.isfinite(recorded).all():
        return recorded.to(weight.device)
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        return torch.randn(4, layer.in_features, generator=generator).to(weight.device)
    reach = [d * (k - 1) + 2 for k, d in zip(kernel, layer.dilation, strict=True)]  # type: ignore[arg-type]
    return torch.randn(2, int(layer.in_channels), *reach, generator=generator).to(weight.device)  # type: ignore[arg-type]


@torch.no_grad()
def _verify(name: str, layer: nn.Module, structure: Structure, in_memory: bool, module: nn.Module, x: Tensor) -> None:
    """In float64, so that neither TF32 nor the order of sums plays a part."""
    with torch.autocast(x.device.type, enabled=False):
        dense = copy.deepcopy(layer).double()
        if not in_memory:
            dense.weight.copy_(structure.reconstruct(torch.float64))  # type: ignore[operator]
        if structure.bias is not None:
            dense.bias = nn.Parameter(structure.bias.double())
        expected = dense(x.double())
        error = float(torch.linalg.vector_norm(copy.deepcopy(module).double()(x.double()) - expected))
        scale = float(torch.linalg.vector_norm(expected))
        if not error <= TOLERANCE * scale + torch.finfo(torch.float32).tiny:
            raise RuntimeError(
                f"Layer {name!r}: the extracted layer's output differs from the projected one's by "
                f"{error / max(scale, 1e-300):.1e} of its norm; expected at most {TOLERANCE:.0e}. The weights have "
                "changed since they were projected, or this is a bug of lowrank_pl"
            )


def _fastest(modules: list[nn.Module], x: Tensor) -> int:
    """The place of the module that takes the least time on this device."""
    trials = [copy.deepcopy(module).eval() for module in modules]
    x = x.to(next(modules[0].parameters()).dtype)
    with torch.no_grad():
        times = median_ms([partial(trial, x) for trial in trials], x.device.type, seconds=0.02, rounds=3)
    return times.index(min(times))
