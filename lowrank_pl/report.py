"""What a network costs, dense beside compressed: parameters, MACs, seconds; and tables of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.compression import Row
from lowrank_pl.extraction import RECORD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import spec_of
from lowrank_pl.structures import Dense, Layout, layout_from_dict
from lowrank_pl.surgery import (
    Call,
    Trace,
    count_inputs,
    find_layers,
    is_same_computation,
    num_parameters,
    record,
    run,
    with_inputs,
)
from lowrank_pl.terminal import terminal
from lowrank_pl.timing import median_ms

BATCHES = (1, 32)


@dataclass(frozen=True)
class Size:
    """Parameters; MACs for one input; milliseconds for a batch, by batch size. None where it was not measured."""

    params: int
    macs: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSize:
    """One layer, dense and as deployed, and why it is as it is."""

    name: str
    structure: str
    dense: Size
    compressed: Size
    note: str


@dataclass(frozen=True)
class Report:
    """A network dense and compressed, in total and layer by layer. MACs are multiply-adds for one input; latency is the
    median of interleaved runs on `device` with `threads` threads."""

    dense: Size
    compressed: Size
    layers: list[LayerSize]
    device: str
    threads: int
    uncounted: tuple[str, ...] = ()  # kinds of modules whose MACs the counter does not see

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def to_markdown(self, **accuracy: tuple[float, float]) -> str:
        """Two tables: the network, with further rows such as `accuracy=(dense, compressed)`, and its layers."""
        head = ["| | dense | compressed | ratio |", "|---|---:|---:|---:|"]
        head += [f"| {' | '.join(row)} |" for row in self._totals(accuracy)]
        body = [f"| {' | '.join(_LAYER_COLUMNS)} |", "|---|---|---:|---:|---:|---:|---:|---:|---|"]
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
        for i, column in enumerate(_LAYER_COLUMNS):
            table.add_column(column, justify="right" if 2 <= i < 8 else "left", no_wrap=i == 0)
        for row in self._layer_rows():
            table.add_row(*row)
        return table

    def _caption(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        but = f", without those of {', '.join(self.uncounted)}" if self.uncounted else ""
        return (
            f"MACs: multiply-adds for one input{but}. Latency: median, {self.device}, {self.threads} {threads}, "
            "float32."
        )

    def _totals(self, accuracy: dict[str, tuple[float, float]]) -> list[list[str]]:
        rows = [
            [name, f"{100 * a:.2f} %", f"{100 * b:.2f} %", f"{100 * (b - a):+.2f}"] for name, (a, b) in accuracy.items()
        ]
        rows.append(["parameters", *_pair(self.dense.params, self.compressed.params)])
        if self.dense.macs and self.compressed.macs:
            rows.append(["MACs", *_pair(self.dense.macs, self.compressed.macs)])
        for batch, ms in self.dense.latency_ms.items():
            other = self.compressed.latency_ms[batch]
            rows.append([f"latency, batch {batch}", f"{ms:.2f} ms", f"{other:.2f} ms", f"{ms / other:.2f}x"])
        return rows

    def _layer_rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            times = [
                " / ".join(f"{ms:.2f}" for ms in size.latency_ms.values()) for size in (layer.dense, layer.compressed)
            ]
            counts = [f"{layer.dense.params:,}", f"{layer.compressed.params:,}", _count(layer.dense.macs),
                      _count(layer.compressed.macs)]  # fmt: skip
            rows.append([layer.name, layer.structure, *counts, *times, layer.note])
        return rows


_LAYER_COLUMNS = ("layer", "structure", "params", "to", "MACs", "to", "ms, batch 1 / 32", "to", "note")


def summarize(
    dense: nn.Module,
    compressed: nn.Module,
    example_input: Any = None,
    latency: bool = True,
    batch_size: int | None = None,
) -> Report:
    """Count and time a network and its compressed copy side by side.

    `example_input` is a batch (the argument, a tuple of arguments, or `lowrank_pl.surgery.Call(kwargs=...)`), on the
    networks' device, of `batch_size` inputs, which is to be given where its tensors do not tell; MACs are counted by
    PyTorch's own counter on its first input. Without it, or with `latency=False`, nothing is timed. Both networks are
    left as they were.
    """
    for argument, network in (("dense", dense), ("compressed", compressed)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected argument `{argument}` to be a module but got {network!r:.100}")
    missing = find_layers(dense).keys() - {name for name, _ in compressed.named_modules()}
    if missing:
        raise ValueError(
            f"Expected argument `compressed` to be a copy of `dense`, made by compress() or ExtractStructure, but it "
            f"has no {min(missing)!r}; the dense network comes first"
        )
    if example_input is None:
        return summarize_layers(dense, compressed, Trace())
    call = replace(Call.of(example_input), batch=count_inputs(example_input, batch_size))
    total = _measure((dense, compressed), call, latency)
    report = _report(dense, compressed, record(dense, call), total, latency)
    of_layers = sum(layer.dense.macs or 0 for layer in report.layers)
    if of_layers > 1.01 * (report.dense.macs or 0):
        warnings.warn(
            f"The layers have {of_layers:,} MACs for one input, more than the {report.dense.macs:,} of the whole "
            f"network: the example was taken to hold {call.batch} inputs. Give `batch_size`",
            stacklevel=2,
        )
    return report


def summarize_layers(dense: nn.Module, compressed: nn.Module, trace: Trace) -> Report:
    """The same from what a trace knows: the network's MACs are those of its layers and what was counted beside them,
    its latency that of all that `training_step` called."""
    report = _report(dense, compressed, trace, (Size(0), Size(0)), latency=True)
    rest = sum((trace.rest or {}).values()) / trace.batch
    times: dict[str, list[float]] = {}
    if trace.called and all(name in trace.arguments for name in trace.called):
        for name in trace.called:
            pair = dense.get_submodule(name), compressed.get_submodule(name)
            for size, ms in _all_times(pair, trace.arguments[name]).items():
                times[size] = [a + b for a, b in zip(times.get(size, [0.0, 0.0]), ms, strict=True)]

    def total(i: int, network: nn.Module, sizes: list[Size]) -> Size:
        known = [size.macs for size in sizes if size.macs is not None]
        macs = round(sum(known) + rest) if known else None
        return Size(num_parameters(network), macs, {size: ms[i] for size, ms in times.items()})

    return replace(
        report,
        dense=total(0, dense, [layer.dense for layer in report.layers]),
        compressed=total(1, compressed, [layer.compressed for layer in report.layers]),
    )


def _report(dense: nn.Module, compressed: nn.Module, trace: Trace, total: tuple[Size, Size], latency: bool) -> Report:
    entry = getattr(compressed, RECORD, {"layers": {}, "notes": {}})
    layers = []
    for name, layer in find_layers(dense).items():
        layout = _layout(name, layer, entry["layers"].get(name), trace)
        sizes = _layer_sizes(name, (layer, compressed.get_submodule(name)), trace, layout, latency)
        layers.append(LayerSize(name, layout.describe(), *sizes, entry["notes"].get(name, "")))
    parameter = next(dense.parameters(), torch.zeros(()))
    uncounted = sorted({type(module).__name__ for module in dense.modules() if isinstance(module, nn.RNNBase)})
    return Report(*total, layers, _device_name(parameter.device), torch.get_num_threads(), tuple(uncounted))


def print_plan(rows: Sequence[Row], console: Console | None = None, title: str = "Low-rank structures") -> None:
    """The table of a plan: every layer, its structure and rank, or why it stays dense."""
    table = Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False)
    for column, justify in (("layer", "left"), ("structure", "left"), ("rank", "right"), ("weights", "right"),
                            ("to", "right"), ("ratio", "right"), ("note", "left")):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=column != "note")  # type: ignore[arg-type]
    for row in rows:
        rank = "" if row.rank is None else ", ".join(map(str, row.rank))
        ratio = "" if row.rank is None or not row.weights else f"{row.dense_weights / row.weights:.2f}x"
        table.add_row(row.name, row.structure, rank, f"{row.dense_weights:,}", f"{row.weights:,}", ratio, row.note)
    weights, to = sum(row.dense_weights for row in rows), sum(row.weights for row in rows)
    table.add_section()
    table.add_row("all", "", "", f"{weights:,}", f"{to:,}", f"{weights / max(to, 1):.2f}x", "biases and norms apart")
    (console or terminal()).print(table)


def _layout(name: str, layer: nn.Module, entry: dict[str, Any] | None, trace: Trace) -> Layout:
    """What a record says became of a layer."""
    spec = LayerSpec("linear", 0, 0) if isinstance(layer, LazyModuleMixin) else trace.on(name, spec_of(layer))
    return Dense(spec) if entry is None else layout_from_dict(entry["structure"], spec)


def _layer_sizes(
    name: str, pair: tuple[nn.Module, nn.Module], trace: Trace, layout: Layout, latency: bool
) -> tuple[Size, Size]:
    """A layer and what replaces it, for one input of the network: all its calls, tokens and windows count."""
    inputs = layout.layer.inputs
    if not inputs or name not in trace.samples:
        return Size(num_parameters(pair[0])), Size(num_parameters(pair[1]))
    times: dict[str, list[float]] = {}
    sample = trace.samples[name]
    for size in BATCHES if latency else ():
        call = with_inputs(Call((sample,)), len(sample), size * inputs[0][0])
        times[str(size)] = _times([copy.deepcopy(m).eval() for m in pair], call, sample.device)
    macs = layout.layer.macs, layout.macs
    first, second = (
        Size(num_parameters(module), macs[i], {size: ms[i] for size, ms in times.items()})
        for i, module in enumerate(pair)
    )
    return first, second


def _measure(pair: tuple[nn.Module, nn.Module], call: Call, latency: bool) -> tuple[Size, Size]:
    """Both modules on the same arguments: MACs on one input, latency by batch size."""
    one = with_inputs(call, call.batch or 1, 1)
    macs = [_count_macs(copy.deepcopy(module).eval(), one) for module in pair]
    times = _all_times(pair, call) if latency else {}
    sizes = [
        Size(num_parameters(module), macs[i], {size: ms[i] for size, ms in times.items()})
        for i, module in enumerate(pair)
    ]
    return sizes[0], sizes[1]


def _all_times(pair: tuple[nn.Module, nn.Module], call: Call) -> dict[str, list[float]]:
    """Milliseconds of both, by batch size."""
    trials = [copy.deepcopy(module).eval() for module in pair]
    device = next((p.device for p in pair[0].parameters()), torch.device("cpu"))
    return {str(size): _times(trials, with_inputs(call, call.batch or 1, size), device) for size in BATCHES}


def _times(pair: Sequence[nn.Module], call: Call, device: torch.device) -> list[float]:
    """Milliseconds of both, in turns. What was not replaced takes the same time by construction: no noise of the
    measurement is shown as a gain."""
    same = is_same_computation(*pair)
    ms = median_ms([_runner(module, call) for module in (pair[:1] if same else pair)], device.type)
    return [ms[0], ms[-1]]


def _runner(module: nn.Module, call: Call) -> Callable[[], Any]:
    @torch.inference_mode()
    def run_once() -> None:
        module(*call.args, **call.kwargs)

    return run_once


def _count_macs(module: nn.Module, call: Call) -> int:
    run(module, call)  # a layer that rebuilds its dense weight has done so before anything is counted
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused operations, of which the counter may know nothing
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
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
    return [f"{a:,}", f"{b:,}", f"{a / b:.2f}x"]
