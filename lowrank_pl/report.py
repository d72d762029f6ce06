"""What a network costs, dense beside compressed: parameters, MACs, seconds; and tables of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.adapters import LinearMap, find_maps, release_
from lowrank_pl.compression import Row
from lowrank_pl.extraction import RECORD
from lowrank_pl.names import clean_name
from lowrank_pl.samples import by_keywords
from lowrank_pl.side_by_side import BATCHES, NETWORK, SideBySide, Times, added, medians, ratios
from lowrank_pl.structures import Dense, Layout, layout_from_dict
from lowrank_pl.surgery import detached_copy, num_parameters
from lowrank_pl.terminal import terminal
from lowrank_pl.timing import Ratio
from lowrank_pl.tracing import FUSED, Call, Trace, count_inputs, record, run, with_inputs


@dataclass(frozen=True)
class Size:
    """Parameters; MACs for one input; milliseconds for a batch, by batch size. None where it was not measured."""

    params: int
    macs: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    index_bytes: int = 0  # of what says where stored weights stand, in the file


@dataclass(frozen=True)
class LayerSize:
    """One layer, dense and as deployed, and why it is as it is."""

    name: str
    structure: str
    dense: Size
    compressed: Size
    note: str
    response: float | None = None  # relative error of its outputs, on data that it was not fitted to where there were


@dataclass(frozen=True)
class Report:
    """A network dense and compressed, in total and layer by layer. MACs are multiply-adds for one input; latency is the
    median of interleaved runs on `device` with `threads` threads; `speedup`, by batch size, that of the ratios of times
    that were measured side by side; `machine` is how busy it was meanwhile (`MachineWatch.state`)."""

    dense: Size
    compressed: Size
    layers: list[LayerSize]
    device: str
    threads: int
    uncounted: tuple[str, ...] = ()  # kinds of modules whose MACs the counter does not see
    speedup: dict[str, Ratio] = field(default_factory=dict)
    machine: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def to_markdown(self, **accuracy: tuple[float, float]) -> str:
        """Two tables: the network, with further rows such as `accuracy=(dense, compressed)`, and its layers."""
        head = ["| | dense | compressed | ratio |", "|---|---:|---:|---:|"]
        head += [f"| {' | '.join(row)} |" for row in self._totals(accuracy)]
        columns = self._columns
        body = [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 3)}---|"]
        body += [f"| {' | '.join(row)} |" for row in self._layer_rows()]
        return "\n".join([*head, "", f"*{self._caption()}*", "", *body, ""])

    def to_table(self, **accuracy: tuple[float, float]) -> Table:
        """The network's totals, for a terminal."""
        table = Table("", box=box.SIMPLE_HEAD, title="Dense beside compressed", caption=self._caption())
        for column in ("dense", "compressed", "ratio"):
            table.add_column(column, justify="right")
        for row in self._totals(accuracy):
            table.add_row(*row)
        return table

    def layer_table(self) -> Table:
        """Layer by layer, for a terminal."""
        table = Table(box=box.SIMPLE_HEAD, title="Layer by layer", pad_edge=False)
        columns = self._columns
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if 2 <= i < len(columns) - 1 else "left", no_wrap=i == 0)
        for row in self._layer_rows():
            table.add_row(*row)
        return table

    def _caption(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        but = f", without those of {', '.join(self.uncounted)}" if self.uncounted else ""
        timed = [len(size.latency_ms) for size in (self.dense, *(layer.dense for layer in self.layers)) if size.macs]
        gaps = " Gaps: not run as a whole, or more than memory or a minute allows." if len(set(timed)) > 1 else ""
        even = " Even: no difference was seen." if any(ratio.is_even for ratio in self.speedup.values()) else ""
        busy, cores = self.machine.get("others", 0.0), self.machine.get("cores", 1)
        others = f" Other processes kept {busy:.1f} of {cores} cores busy." if self.speedup and busy >= 0.2 else ""
        return (
            f"MACs: multiply-adds for one input{but}. Latency: median, {self.device}, {self.threads} {threads}, "
            f"float32; its ratio with a 99.9 % interval.{even}{others}{gaps}"
        )

    def _totals(self, accuracy: dict[str, tuple[float, float]]) -> list[list[str]]:
        rows = [
            [name, f"{100 * a:.2f} %", f"{100 * b:.2f} %", f"{100 * (b - a):+.2f}"] for name, (a, b) in accuracy.items()
        ]
        rows.append(["parameters", *_pair(self.dense.params, self.compressed.params)])
        if self.dense.macs and self.compressed.macs:
            rows.append(["MACs", *_pair(self.dense.macs, self.compressed.macs)])
        if self.compressed.index_bytes:
            rows.append(["index bytes", "0", f"{self.compressed.index_bytes:,}", ""])
        for batch, ms in self.dense.latency_ms.items():
            other = self.compressed.latency_ms[batch]
            ratio = str(self.speedup.get(batch) or f"{ms / other:.2f}x")
            rows.append([f"latency, batch {batch}", f"{ms:.2f} ms", f"{other:.2f} ms", ratio])
        return rows

    def _layer_rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            times = [
                " / ".join(f"{ms:.2f}" for ms in size.latency_ms.values()) for size in (layer.dense, layer.compressed)
            ]
            counts = [f"{layer.dense.params:,}", f"{layer.compressed.params:,}", _count(layer.dense.macs),
                      _count(layer.compressed.macs)]  # fmt: skip
            indices = [f"{layer.compressed.index_bytes:,}"] if self.compressed.index_bytes else []
            rows.append([layer.name, layer.structure, *counts, *indices, *times, *self._error_of(layer), layer.note])
        return rows

    @property
    def _columns(self) -> tuple[str, ...]:
        *columns, last = _LAYER_COLUMNS
        if self.compressed.index_bytes:
            columns.insert(_LAYER_COLUMNS.index("ms, batch 1 / 32"), "index bytes")
        return (*columns, *(["response error"] if self._has_responses else []), last)

    @property
    def _has_responses(self) -> bool:
        return any(layer.response is not None for layer in self.layers)

    def _error_of(self, layer: LayerSize) -> list[str]:
        if not self._has_responses:
            return []
        return ["" if layer.response is None else _in_percent(layer.response)]


def _in_percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


_LAYER_COLUMNS = ("layer", "structure", "params", "to", "MACs", "to", "ms, batch 1 / 32", "to", "note")


def summarize(
    dense: nn.Module,
    compressed: nn.Module,
    example_input: Any = None,
    latency: bool = True,
    batch_size: int | None = None,
) -> Report:
    """Count and time a network and its compressed copy side by side.

    `example_input` is a batch (the argument, a tuple of arguments, a mapping with names of arguments, or
    `lowrank_pl.Call(kwargs=...)`), on the networks' device, of `batch_size` inputs, which is to be given where its
    tensors do not tell; MACs are counted by PyTorch's own counter on its first input. Without it, or with
    `latency=False`, nothing is timed; else what fits into memory and about a minute is, the networks first. Both
    networks are left as they were.
    """
    for argument, network in (("dense", dense), ("compressed", compressed)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected argument `{argument}` to be a module but got {network!r:.100}")
    named = [{clean_name(name) for name, _ in network.named_modules()} for network in (dense, compressed)]
    replaced = tuple(f"{name}." for name in getattr(compressed, RECORD, {"layers": {}})["layers"])
    missing = {name for name in named[0] - named[1] if not name.startswith(replaced)}
    if missing:
        raise ValueError(
            f"Expected argument `compressed` to be a copy of `dense`, made by compress() or ExtractStructure, but it "
            f"has no {min(missing)!r}; the dense network comes first"
        )
    if example_input is None:
        return summarize_layers(dense, compressed, Trace())
    example_input = by_keywords(dense, example_input)
    call = replace(Call.of(example_input), batch=count_inputs(example_input, batch_size))
    watch = SideBySide(latency)
    total, times = _measure((dense, compressed), call, watch)
    report = _report(dense, compressed, record(dense, call), total, times, watch)
    of_layers = sum(layer.dense.macs or 0 for layer in report.layers)
    if of_layers > 1.01 * (report.dense.macs or 0):
        warnings.warn(
            f"The layers have {of_layers:,} MACs for one input, more than the {report.dense.macs:,} of the whole "
            f"network: the example was taken to hold {call.batch} inputs. Give `batch_size`",
            stacklevel=2,
        )
    return report


def summarize_layers(dense: nn.Module, compressed: nn.Module, trace: Trace, latency: bool = True) -> Report:
    """The same from what a trace knows: the network's MACs are those of its layers and what was counted beside them,
    its latency that of all that `training_step` called."""
    watch = SideBySide(latency)
    times = _times_of_calls((dense, compressed), trace, watch)
    report = _report(dense, compressed, trace, (Size(0), Size(0)), times, watch)
    rest = sum((trace.rest or {}).values()) / trace.batch

    def total(i: int, network: nn.Module, sizes: list[Size]) -> Size:
        known = [size.macs for size in sizes if size.macs is not None]
        macs = round(sum(known) + rest) if known else None
        return Size(num_parameters(network), macs, medians(times)[i], sum(size.index_bytes for size in sizes))

    return replace(
        report,
        dense=total(0, dense, [layer.dense for layer in report.layers]),
        compressed=total(1, compressed, [layer.compressed for layer in report.layers]),
    )


def _report(  # both networks, and what is known of them
    dense: nn.Module, compressed: nn.Module, trace: Trace, total: tuple[Size, Size], times: Times, watch: SideBySide
) -> Report:
    entry = getattr(compressed, RECORD, {"layers": {}, "notes": {}})
    layers = []
    for name, each in watch.shown(list(find_maps(dense).items())):
        layout = _layout(name, each, entry["layers"].get(name), trace)
        sizes = _layer_sizes(name, _pair_of(each, compressed, name in entry["layers"]), trace, layout, watch)
        response = entry.get("responses", {}).get(name, {})
        held = response.get("held_out")
        error = response.get("fitted") if held is None else held
        layers.append(LayerSize(name, layout.describe(), *sizes, entry["notes"].get(name, ""), error))
    parameter = next(dense.parameters(), torch.zeros(()))
    fused = [module for module in dense.modules() if isinstance(module, nn.RNNBase) and parameter.device.type != "cpu"]
    uncounted = sorted({type(module).__name__ for module in fused})
    indices = sum(layer.compressed.index_bytes for layer in layers)
    total = (total[0], replace(total[1], index_bytes=indices))
    device = _device_name(parameter.device)
    return Report(*total, layers, device, torch.get_num_threads(), tuple(uncounted), ratios(times), watch.state())


def print_plan(rows: Sequence[Row], console: Console | None = None, title: str = "Low-rank structures") -> None:
    """The table of a plan: every layer, its structure and rank, or why it stays dense."""
    table = Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False)
    for column, justify in (("layer", "left"), ("structure", "left"), ("rank", "right"), ("weights", "right"),
                            ("to", "right"), ("ratio", "right"), ("note", "left")):  # fmt: skip
        # names fold where they are long, so that reasons can be read
        least = {"layer": 16, "note": 24}.get(column)
        table.add_column(column, justify=justify, overflow="fold", no_wrap=least is None, min_width=least)  # type: ignore[arg-type]
    for row in rows:
        rank = "" if row.rank is None else ", ".join(map(str, row.rank))
        ratio = "" if row.rank is None or not row.weights else f"{row.dense_weights / row.weights:.2f}x"
        table.add_row(row.name, row.structure, rank, f"{row.dense_weights:,}", f"{row.weights:,}", ratio, row.note)
    weights, to = sum(row.dense_weights for row in rows), sum(row.weights for row in rows)
    table.add_section()
    table.add_row("all", "", "", f"{weights:,}", f"{to:,}", f"{weights / max(to, 1):.2f}x", "biases and norms apart")
    (console or terminal()).print(table)


def _pair_of(dense: LinearMap, compressed: nn.Module, is_replaced: bool) -> tuple[nn.Module, nn.Module]:
    """A linear map as a layer, and what has replaced it."""
    layer = dense.module if dense.is_layer else dense.as_layer()
    if is_replaced:
        return layer, compressed.get_submodule(dense.name)
    return layer, compressed.get_submodule(dense.name) if dense.is_layer else layer


def _layout(name: str, dense: LinearMap, entry: dict[str, Any] | None, trace: Trace) -> Layout:
    """What a record says became of a layer."""
    spec = trace.on(name, dense.layer)
    return Dense(spec) if entry is None else layout_from_dict(entry["structure"], spec)


def _layer_sizes(
    name: str, pair: tuple[nn.Module, nn.Module], trace: Trace, layout: Layout, watch: SideBySide
) -> tuple[Size, Size]:
    """A layer and what replaces it, for one input of the network: all its calls, tokens and windows count."""
    inputs = layout.layer.inputs
    first, second = Size(num_parameters(pair[0]), layout.layer.macs), Size(num_parameters(pair[1]), layout.macs)
    second = replace(second, index_bytes=layout.index_bytes)
    if not inputs or name not in trace.samples:
        return first, second
    sample = trace.samples[name]
    batch_of = lambda size: with_inputs(Call((sample,)), len(sample), size * inputs[0][0])  # noqa: E731
    ms = medians(watch.times([_trial(module) for module in pair], batch_of, sample.device))
    return replace(first, latency_ms=ms[0]), replace(second, latency_ms=ms[1])


def _measure(pair: tuple[nn.Module, nn.Module], call: Call, watch: SideBySide) -> tuple[tuple[Size, Size], Times]:
    """Both modules on the same arguments: MACs on one input, latency by batch size."""
    trials, one = [_trial(module) for module in pair], with_inputs(call, call.batch or 1, 1)
    macs = [_count_macs(trial, one) for trial in trials]
    times = _times_of_call(trials, call, watch)
    first, second = (Size(num_parameters(pair[i]), macs[i], medians(times)[i]) for i in range(2))
    return (first, second), times


def _times_of_calls(pair: tuple[nn.Module, nn.Module], trace: Trace, watch: SideBySide) -> Times:
    """Both, all that `training_step` called together; of the batch sizes at which each could be timed."""
    if not all(name in trace.arguments for name in trace.called):
        return {}
    each = [
        _times_of_call([_trial(module.get_submodule(name)) for module in pair], trace.arguments[name], watch)
        for name in trace.called
    ]
    sizes = [size for size in map(str, BATCHES) if each and all(size in times for times in each)]
    return {size: added([times[size] for times in each]) for size in sizes}


def _times_of_call(trials: Sequence[nn.Module], call: Call, watch: SideBySide) -> Times:
    device = next((p.device for p in trials[0].parameters()), torch.device("cpu"))
    return watch.times(trials, lambda size: with_inputs(call, call.batch or 1, size), device, NETWORK)


def _trial(module: nn.Module) -> nn.Module:
    """A copy to be run. Without gradients, for which PyTorch's counter looks, and does not find them where a network
    hands a view of a parameter to its submodules."""
    trial = detached_copy(module).eval().requires_grad_(False)
    release_(trial)
    return trial


def _count_macs(module: nn.Module, call: Call) -> int:
    run(module, call)  # a layer that rebuilds its dense weight has done so before anything is counted
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused operations, of which the counter may know nothing
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            run(module, call)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops: int = counter.get_total_flops()
    return flops // 2


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _pair(a: int, b: int) -> list[str]:
    return [f"{a:,}", f"{b:,}", f"{a / b:.2f}x" if b else ""]  # constant layers alone have none
