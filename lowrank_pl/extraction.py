"""From projected weights to a plain module, verified layer by layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowrank_pl.adapters import LinearMap, find_maps
from lowrank_pl.compression import Plan
from lowrank_pl.names import clean_name, under
from lowrank_pl.structures import Dense, Structure
from lowrank_pl.surgery import deploy, detached_copy, heads_of
from lowrank_pl.timing import median_ms
from lowrank_pl.tracing import Trace, eager, run, slow_paths

T = TypeVar("T")

TOLERANCE = 1e-4
RECORD = "lowrank_pl_record"  # the attribute of an extracted module that says what was done to it


def extract(
    model: nn.Module,
    plan: Plan,
    structures: Mapping[str, Structure],
    notes: Mapping[str, str],
    trace: Trace | None = None,
    shared: tuple[Any, ...] = (),
    in_memory: bool = False,
    part: str = "",
) -> nn.Module:
    """A deep copy of `model`, or of the `part` of that name alone, with a module of factors for every structure that is
    not dense.

    Each is compared in float64 with the layer that it replaces, on inputs from the trace (on random ones where there
    are none): `RuntimeError` with the layer's name if outputs differ by more than 1e-4. The layer runs with the
    projected weight, or, with `in_memory`, with the one that it holds, which has been projected. A record of what was
    done, in plain types, with `notes` on the targets, is left on the copy for `save_compressed` and `summarize`. A
    structure that can compute in several forms takes the one that is faster on those inputs. Objects in `shared`, such
    as a trainer, are not copied.
    """
    extracted = detached_copy(part_of(model, part), shared)
    maps = find_maps(extracted)
    parts: dict[str, nn.Module] = {}
    earlier = _earlier(extracted)
    entries: dict[str, Any] = {}
    reasons = {**plan.dense, **notes}
    whole = {(each.module, each.key): name for name, each in find_maps(model).items()}
    own = find_maps(part_of(model, part))
    names = {name: whole[each.module, each.key] for name, each in own.items()}  # those of the plan
    notes = earlier["notes"] | {name: reasons[names[name]] for name in maps if names[name] in reasons}
    compressions = {c.name: c for c in plan.compressions}
    for name, each in maps.items():
        c = compressions.get(names[name])
        if c is None:
            continue
        if isinstance(structures[c.name].layout, Dense) and each.adapter.is_exact(each.module, each.key):
            continue
        structure = structures[c.name]
        seen = trace is not None and c.name in trace.samples
        x = _sample(each, trace.samples[c.name] if trace is not None and seen else None)
        bias, learns = each.bias, any(p.requires_grad for p in each.parameters)
        forms = [structure.with_layout(layout) for layout in structure.layout.forms()]
        modules = [form.to_module(bias).train(each.module.training) for form in forms]
        for module in modules:
            module.requires_grad_(learns or (bias is not None and bias.requires_grad))
            _verify(each, structure, in_memory, module, x)
        fastest = _fastest(modules, x) if seen and len(modules) > 1 else 0
        layout = forms[fastest].layout
        notes[name] = "; ".join(filter(None, [notes.get(name, ""), layout.note]))
        parts[name] = modules[fastest]
        entries[name] = {"structure": layout.to_dict(), "replaces": c.layer.to_dict()}
        if structure.bias is not None and bias is None:
            entries[name]["bias"] = True  # which the layer it replaces has not
        for head in heads_of(maps, name):
            entries[head], notes[head] = {**entries[name], "tied": name}, f"the weight of {name}"
    if not entries:
        words = "; ".join(dict.fromkeys(filter(None, notes.values()))) or "it has no layers"
        warnings.warn(f"No layer was compressed: all of them stay dense ({words})", stacklevel=2)
    extracted = deploy(extracted, parts)
    setattr(extracted, RECORD, {"layers": earlier["layers"] | entries, "notes": notes})
    return extracted


def part_of(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, which is without what `torch.compile` adds. Raises `ValueError` if there is none."""
    parts: dict[str, nn.Module] = {clean_name(own): module for own, module in model.named_modules()}
    if name not in parts:
        raise ValueError(
            f"Expected argument `submodule` to name a part of {type(model).__name__} but got {name!r}; it has "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    return parts[name]


def _earlier(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The record of what was compressed before, in the model or in parts of it."""
    found: dict[str, dict[str, Any]] = {"layers": {}, "notes": {}}
    for start, module in model.named_modules():
        for key, entries in getattr(module, RECORD, {}).items():
            own = {f"{start}.{name}".strip("."): value for name, value in entries.items()}
            found[key] = found.get(key, {}) | own
    return found


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


def difference(projected: nn.Module, extracted: nn.Module, example_input: Any, part: str = "") -> str | None:
    """Run a network with projected weights and what was extracted from it, both as a whole and in evaluation mode: what
    differs, in words, or None. Or that `part` of both that takes the input: an argument, a tuple of them or a `Call`.

    Their outputs, and which of the compressed layers run: an extracted network may call layers of another one, and
    give its output. Nothing is said where the projected network does not run, or differs as much from itself after
    rounding: by random numbers of its own, or because it decides by a threshold. Both are left as they were.
    """
    names = set(under(part, getattr(extracted, RECORD)["layers"]))
    projected, extracted = projected.get_submodule(part), extracted.get_submodule(part)
    names &= {name for name, each in find_maps(projected).items() if each.is_layer}  # attention calls no layers
    try:
        expected = _heard(projected, names, example_input)
    except Exception:  # of any kind: its own code, in a mode that it may not know
        return None
    try:
        problem = _compare(_heard(extracted, names, example_input), expected)
    except Exception as error:
        return f"it does not run ({type(error).__name__}: {error})"
    if problem is None:
        return None
    with _rounded(projected):
        unsteady = _compare(_heard(projected, names, example_input), expected)
    return None if unsteady else problem


def _heard(model: nn.Module, names: Collection[str], example_input: Any) -> tuple[set[str], list[Any]]:
    """Which of the named modules run, and the leaves of the output."""
    ran: set[str] = set()
    handles = [model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: ran.add(n)) for n in names]
    try:
        with eager(), slow_paths():  # which call hooks, and compute something where a mask says that nothing is
            return ran, tree_leaves(run(model, example_input))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """An error of a few last bits in every parameter, for as long as it lasts."""
    saved = [(p, p.detach().clone()) for p in model.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    try:
        for p, value in saved:
            noise = torch.randn(p.shape, generator=generator).to(value)
            p.detach().mul_(1 + 8 * torch.finfo(p.dtype).eps * noise)
        yield
    finally:
        for p, value in saved:
            p.detach().copy_(value)


def _compare(found: tuple[set[str], list[Any]], expected: tuple[set[str], list[Any]]) -> str | None:
    different = found[0] ^ expected[0]
    if different:
        return f"layer {min(different)!r} runs in one of them alone"
    for a, b in zip_longest(found[1], expected[1]):
        if not (isinstance(b, Tensor) and (b.is_floating_point() or b.is_complex())):
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return f"expected an output of shape {list(b.shape)} but got {list(getattr(a, 'shape', []))}"
        finite = torch.isfinite(b)  # masks may hold infinite numbers
        exact = torch.complex128 if b.is_complex() else torch.float64
        a, b, tolerance = a[finite].to(exact), b[finite].to(exact), max(1e-2, 10 * torch.finfo(b.dtype).eps)
        error, scale = (float(torch.linalg.vector_norm(x)) for x in (a - b, b))
        if not error <= tolerance * scale + torch.finfo(torch.float32).tiny:
            return f"outputs differ by {error / max(scale, 1e-300):.1e} of their norm; expected at most {tolerance:.0e}"
    return None


def _sample(dense: LinearMap, recorded: Tensor | None) -> Tensor:
    """Recorded inputs, or, where there are none or not finite ones, random ones just large enough for the kernel."""
    weight, spec = dense.parameters[0], dense.layer
    if recorded is not None and torch.isfinite(recorded).all():
        return recorded.to(weight.device)
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "linear":
        return torch.randn(4, spec.in_channels, generator=generator).to(weight.device)
    reach = [d * (k - 1) + 2 for k, d in zip(spec.kernel, spec.dilation, strict=True)]
    return torch.randn(2, spec.in_channels, *reach, generator=generator).to(weight.device)


@torch.no_grad()
def _verify(dense: LinearMap, structure: Structure, in_memory: bool, module: nn.Module, x: Tensor) -> None:
    """In float64, so that neither TF32 nor the order of sums plays a part."""
    with torch.autocast(x.device.type, enabled=False):
        layer: Any = dense.as_layer().double()
        if not in_memory:
            layer.weight.copy_(structure.reconstruct(torch.float64))
        if structure.bias is not None:
            layer.bias = nn.Parameter(structure.bias.double())
        expected = layer(x.double())
        error = float(torch.linalg.vector_norm(copy.deepcopy(module).double()(x.double()) - expected))
        scale = float(torch.linalg.vector_norm(expected))
        if not error <= TOLERANCE * scale + torch.finfo(torch.float32).tiny:
            raise RuntimeError(
                f"Layer {dense.name!r}: the extracted layer's output differs from the projected one's by "
                f"{error / max(scale, 1e-300):.1e} of its norm; expected at most {TOLERANCE:.0e}. The weights have "
                "changed since they were projected, or this is a bug of lowrank_pl"
            )


def _fastest(modules: list[nn.Module], x: Tensor) -> int:
    """The place of the module that takes the least time on this device."""
    trials = [copy.deepcopy(module).eval() for module in modules]
    x = x.to(next(modules[0].parameters()).dtype)
    try:
        with torch.no_grad():
            times = median_ms([partial(trial, x) for trial in trials], x.device.type, seconds=0.02, rounds=3)
    except RuntimeError:  # too little memory for one of them: the first one needs no more than the dense layer
        return 0
    return times.index(min(times))
