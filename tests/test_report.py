"""Counts against hand counts and PyTorch's own counter; tables."""

import copy
import io
import itertools
import json
import os
import sys
import time

import pytest
import torch
from nets import Net, distance, images, weights
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import (
    BlockSVD,
    FixedRank,
    RankFraction,
    SpatialSVD,
    Targets,
    TiledSVD,
    Tucker2,
    compress,
    make_plan,
    summarize,
)
from lowrank_pl.adapters import find_maps
from lowrank_pl.evaluation import evaluate
from lowrank_pl.report import print_plan
from lowrank_pl.surgery import is_same_computation
from lowrank_pl.timing import PeakMemory, Ratio, free_bytes, times_ms
from lowrank_pl.tracing import record

X = images(2)[0]
RANK = FixedRank(2)
METHODS = ["svd", BlockSVD(4), SpatialSVD(), Tucker2(), TiledSVD(8, "dense"), TiledSVD(8, "factors")]


def flops(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
def test_counts(method):
    dense = Net(norm=True).eval()
    compressed = compress(dense, method, RANK, example_input=X).eval()
    report = summarize(dense, compressed, X, latency=False)
    for size, model in ((report.dense, dense), (report.compressed, compressed)):
        with torch.no_grad():
            model(X[:1])  # rebuilds a dense weight, once
        assert size.params == sum(p.numel() for p in model.parameters())
        assert size.macs * 2 == flops(model, X[:1])
        assert size.latency_ms == {}
    for which in ("dense", "compressed"):
        layers = [getattr(layer, which) for layer in report.layers]
        assert sum(size.macs for size in layers) == getattr(report, which).macs
        rest = sum(p.numel() for p in dense.norm.parameters())
        assert sum(size.params for size in layers) + rest == getattr(report, which).params


def test_by_hand():
    """conv1 8 x 27 on 64 positions, conv2 12 x 72 on 16, fc1 16 x 48, fc2 4 x 16."""
    dense = Net()
    report = summarize(dense, compress(dense, "svd", RANK), X, latency=False)
    assert [layer.name for layer in report.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert [layer.dense.macs for layer in report.layers] == [216 * 64, 864 * 16, 768, 64]
    assert [layer.dense.params for layer in report.layers] == [216 + 8, 864 + 12, 768 + 16, 64 + 4]
    assert [layer.compressed.macs for layer in report.layers] == [216 * 64, (144 + 24) * 16, 96 + 32, 64]
    assert [layer.compressed.params for layer in report.layers] == [224, 168 + 12, 128 + 16, 68]
    assert report.dense.macs == 216 * 64 + 864 * 16 + 768 + 64
    assert [layer.note for layer in report.layers] == ["the first convolution", "", "", "the last linear layer"]
    assert report.layers[1].structure == "3x3 2 > 1x1 12"


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(self.inner(x))).mean(1))


def test_layers_that_run_several_times_per_input():
    """MACs are for one input of the network: seven tokens, and `inner` is called twice."""
    dense, x = Tokens(), torch.randn(3, 7, 16)
    report = summarize(dense, compress(dense, "svd", RANK, example_input=x), x, latency=False)
    assert report.dense.macs == 2 * 7 * 256 + 64
    assert report.compressed.macs == 2 * 7 * 64 + 64
    assert [layer.dense.macs for layer in report.layers] == [2 * 7 * 256, 64]
    assert [layer.compressed.macs for layer in report.layers] == [2 * 7 * 64, 64]


def test_latency(monkeypatch):
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", quick)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    report = summarize(dense, compress(dense, "svd", RANK), torch.randn(2, 16))
    sizes = [report.dense, report.compressed]
    sizes += [size for layer in report.layers for size in (layer.dense, layer.compressed)]
    assert all(list(size.latency_ms) == ["1", "32"] for size in sizes)
    assert all(0 < ms < 1000 for size in sizes for ms in size.latency_ms.values())
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in report.speedup.values())
    assert set(report.speedup) == {"1", "32"}
    assert report.device == "CPU"
    assert report.threads == torch.get_num_threads()
    assert "latency, batch 32" in report.to_markdown()


def quick(functions, device="cpu", *_):
    return times_ms(functions, device, 0.001, 1)


def test_latency_tells_slow_from_fast(monkeypatch):
    monkeypatch.setattr("lowrank_pl.side_by_side.BATCHES", (32,))
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", quick)
    dense = nn.Sequential(nn.Linear(2048, 2048))
    compressed = compress(dense, "svd", FixedRank(8), Targets(skip_last=False))
    x = torch.randn(1, 2048)
    report = summarize(dense, compressed, x)
    assert report.dense.latency_ms["32"] > 2 * report.compressed.latency_ms["32"]


def test_what_takes_too_long_is_not_timed(monkeypatch):
    """Within the seconds that are stated, the network before its layers, and the smaller batch first."""

    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.002 * len(x))
            return super().forward(x)

    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", lambda functions, *_: [[1.0] for _ in functions])
    dense = nn.Sequential(nn.Linear(16, 16), Slow(16, 16))
    compressed = compress(dense, "svd", RANK)
    keys = {}
    for seconds in (100, 0.1, 0):
        monkeypatch.setattr("lowrank_pl.side_by_side.SECONDS", seconds)
        report = summarize(dense, compressed, torch.randn(2, 16))
        keys[seconds] = [list(size.latency_ms) for size in (report.dense, report.layers[1].dense)]
        assert ("Gaps" in report.to_markdown()) == (seconds == 0.1)
    assert keys[100] == [["1", "32"], ["1", "32"]]
    assert keys[0.1][0] == ["1"]
    assert keys[0] == [[], []]


def test_what_does_not_fit_into_memory_is_not_timed(monkeypatch):
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", lambda functions, *_: [[1.0] for _ in functions])
    dense, x = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)), torch.randn(2, 1024)
    for numbers, kept in ((2 * 1024, ["1"]), (2 * 32 * 1024, ["1", "32"])):  # two layers' outputs at a time
        monkeypatch.setattr("lowrank_pl.side_by_side.free_bytes", lambda numbers=numbers: 4 * numbers)
        assert list(summarize(dense, dense, x).dense.latency_ms) == kept


def test_a_network_for_one_input_at_a_time():
    class One(nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(1, 16))

    net = One(16, 4)
    assert list(summarize(net, net, torch.randn(1, 16)).dense.latency_ms) == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_what_the_system_says():
    assert 2**20 < free_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_peak_memory(layers):
    """Of a chain of layers: the input and the output of one of them."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(inplace=True)) for _ in range(layers)))
    with torch.no_grad(), PeakMemory() as memory:
        net(torch.randn(5, 64))
    assert memory.peak == 4 * 5 * 64 * min(layers + 1, 3)  # with the input, which is made inside


def never_twice_the_same():
    """A timer that gives another number at every call and for every function."""
    numbers = itertools.count(1)
    return lambda functions, *_, **__: [[float(next(numbers))] for _ in functions]


def test_what_was_not_replaced_takes_the_same_time(monkeypatch):
    monkeypatch.setattr("lowrank_pl.side_by_side.times_ms", never_twice_the_same())
    dense = Net(norm=True)
    with pytest.warns(UserWarning, match="No layer was compressed"):
        untouched = compress(dense, "svd", FixedRank(1000), example_input=X)
    report = summarize(dense, untouched, X)
    assert report.dense.latency_ms == report.compressed.latency_ms
    assert all(layer.dense.latency_ms == layer.compressed.latency_ms for layer in report.layers)
    assert [row[-1] for row in report._totals({}) if row[0].startswith("latency")] == ["1.00x", "1.00x"]
    report = summarize(dense, compress(dense, {"conv2": "svd"}, RANK, example_input=X), X)
    assert all(report.dense.latency_ms[size] != report.compressed.latency_ms[size] for size in ("1", "32"))
    same = {layer.name: layer.dense.latency_ms == layer.compressed.latency_ms for layer in report.layers}
    assert same == {"conv1": True, "conv2": False, "fc1": True, "fc2": True}


@pytest.mark.parametrize(
    "other",
    [nn.Linear(8, 8, bias=False), nn.Linear(8, 9), nn.Linear(8, 8).double(), nn.Sequential(nn.Linear(8, 8)),
     nn.Bilinear(8, 8, 8)],
)  # fmt: skip
def test_different_networks_are_timed_apart(other):
    assert is_same_computation(nn.Linear(8, 8), nn.Linear(8, 8))
    assert not is_same_computation(nn.Linear(8, 8), other)
    assert not is_same_computation(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2))


def test_a_form_that_is_the_dense_network_is_timed_once(monkeypatch):
    monkeypatch.setattr("lowrank_pl.evaluation.times_ms", never_twice_the_same())
    dense = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 4))
    batches = [(torch.randn(4, 1, 4, 4), torch.zeros(4, dtype=torch.long))]
    images = lambda size: torch.randn(size, 1, 4, 4)  # noqa: E731
    for compressed, same in ((copy.deepcopy(dense), True), (compress(dense, {"1": "svd"}, FixedRank(1)), False)):
        networks = {"dense": dense, "compressed": compressed, "onnx": copy.deepcopy(dense)}
        times = {name: values["latency_ms"] for name, values in evaluate(networks, batches, images).items()}
        assert (times["dense"] == times["compressed"]) == same
        assert times["onnx"] != times["dense"]  # another program, which may take another time


def test_networks_are_left_as_they_were():
    dense = Net(norm=True, dropout=0.5).train()
    dense.conv2.eval()
    compressed = compress(dense, TiledSVD(8), RANK).train()
    handles = [dense.conv1.register_forward_hook(lambda *_: None)]
    before = [(weights(m), {n: c.training for n, c in m.named_modules()}) for m in (dense, compressed)]
    random = torch.get_rng_state()
    summarize(dense, compressed, X, latency=False)
    for model, (state, modes) in zip((dense, compressed), before, strict=True):
        assert distance(weights(model), state) == 0
        assert {n: c.training for n, c in model.named_modules()} == modes
        assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in dense.modules()) == len(handles)
    assert torch.equal(random, torch.get_rng_state())


def test_without_an_input():
    report = summarize(Net(), compress(Net(), "svd", RANK))
    assert report.dense.macs is None
    assert report.compressed.params < report.dense.params
    assert "MACs |" not in report.to_markdown().split("*MACs")[0]
    json.dumps(report.to_dict())


def test_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x = (torch.randn(2, 16), torch.randn(2, 16))
    report = summarize(Sum(), compress(Sum(), "svd", RANK, example_input=x), x, latency=False)
    assert report.dense.macs == 512


def test_a_network_that_is_one_layer():
    dense = nn.Linear(16, 16)
    compressed = compress(dense, "svd", RANK, Targets(skip_last=False))
    report = summarize(dense, compressed, torch.randn(2, 16), latency=False)
    assert (report.dense.macs, report.compressed.macs) == (256, 64)


def test_plain_types_for_json():
    dense = Net()
    report = summarize(dense, compress(dense, TiledSVD(8), RANK, example_input=X), X, latency=False)
    values = json.loads(json.dumps(report.to_dict()))
    counts = {"params": report.dense.params, "macs": report.dense.macs, "index_bytes": 0}
    assert values["dense"] == {**counts, "latency_ms": {}}
    assert [layer["name"] for layer in values["layers"]] == ["conv1", "conv2", "fc1", "fc2"]


def lines(table, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue().splitlines()


def big_report():
    report = summarize(Net(), compress(Net(), "svd", RANK), X, latency=False)
    big = {"params": 138_357_544, "macs": 15_470_264_320, "latency_ms": {"1": 1234.56, "32": 98765.43}}
    sizes = {name: type(report.dense)(**big) for name in ("dense", "compressed")}
    speedup = {"1": Ratio(1.0, 0.91234, 1.13), "32": Ratio(1.0, 1.0, 1.0)}
    return type(report)(**{**report.__dict__, **sizes, "speedup": speedup, "machine": {"cores": 2, "others": 1.44}})


def test_totals_fit_a_terminal():
    """Numbers of VGG16 on ImageNet at 100 columns: one line for each row, none cut."""
    shown = lines(big_report().to_table(accuracy=(0.9263, 0.9191)))
    rows = [" ".join(line.split()) for line in shown]
    for row in (
        "accuracy 92.63 % 91.91 % -0.72",
        "parameters 138,357,544 138,357,544 1.00x",
        "MACs 15,470,264,320 15,470,264,320 1.00x",
        "latency, batch 1 1234.56 ms 1234.56 ms 1.00x (0.91-1.13), even",
        "latency, batch 32 98765.43 ms 98765.43 ms 1.00x",
    ):
        assert row in rows
    assert not any("…" in line for line in shown)
    caption = " ".join(" ".join(shown).split())
    assert "Even: no difference was seen. Other processes kept 1.4 of 2 cores busy." in caption


def test_markdown():
    text = big_report().to_markdown(accuracy=(0.9263, 0.9191))
    assert "| accuracy | 92.63 % | 91.91 % | -0.72 |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert len(tables[1]) == 2 + 4


def test_layer_table_names_every_layer():
    shown = "\n".join(lines(big_report().layer_table(), 160))
    for name in ("conv1", "conv2", "fc1", "fc2", "the first convolution"):
        assert name in shown


def test_how_tiles_run_is_noted():
    for run, words in (("factors", "runs from its factors"), ("dense", "runs dense")):
        dense = Net()
        compressed = compress(dense, {"conv2": TiledSVD(8, run)}, RANK)
        report = summarize(dense, compressed, X, latency=False)
        layer = report.layers[1]
        assert words in layer.note
        assert layer.structure == "tiles of 8, rank 2"
        per_position = 864 if run == "dense" else layer.compressed.params - 12
        assert layer.compressed.macs == 16 * per_position


def test_plans_are_printed():
    net = Net()
    net.fc1.requires_grad_(False)
    plan = make_plan(net, {"conv2": SpatialSVD(), "*": "svd"}, FixedRank(40), training=True)
    out = io.StringIO()
    print_plan(plan.rows(plan.choose_ranks()), Console(file=out, width=250))
    text = out.getvalue()
    assert "frozen" in text
    assert "spatial_svd of rank 24" in text
    assert f"{sum(copy.deepcopy(m).weight.numel() for m in (net.conv1, net.conv2, net.fc1, net.fc2)):,}" in text


def test_attention_is_counted_in_evaluation():
    """PyTorch's fast path for it is one operation, of which its counter knows nothing."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    report = summarize(layer, layer, torch.randn(3, 8, 32), latency=False)
    projections, attention, linear = 8 * 4 * 32 * 32, 2 * 8 * 8 * 32, 2 * 8 * 32 * 64
    assert report.dense.macs == projections + attention + linear
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_networks_are_counted():
    net = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
    macs = sum(p.numel() for p in net.parameters() if p.dim() == 2) * 5
    x = torch.randn(3, 5, 8)
    assert summarize(net, net, x, latency=False).dense.macs == macs
    trace, maps = record(nn.Sequential(net), x), find_maps(nn.Sequential(net))
    assert sum(trace.on(name, each.layer).macs for name, each in maps.items()) == macs
    assert trace.rest == {}


def test_batches_in_dictionaries():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, inputs):
            return self.fc(inputs["x"]) * inputs["scale"]

    net = Named()
    report = summarize(net, net, {"x": torch.randn(5, 8), "scale": torch.tensor(2.0)}, latency=False)
    assert report.dense.macs == report.layers[0].dense.macs == 64


def test_networks_in_the_wrong_order():
    net = Net()
    with pytest.raises(ValueError, match="the dense network comes first"):
        summarize(compress(net, "svd", RANK), net, X)
    with pytest.raises(TypeError, match="`compressed` to be a module"):
        summarize(net, 3, X)


def test_a_network_compressed_twice_has_the_response_errors_of_the_second_time():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(40, 8)
    both = [Targets(["0"], skip_last=False), Targets(["1"], skip_last=False)]
    once = compress(net, "svd", RankFraction(0.25), both[0], data=[x])
    (first, other) = summarize(net, once, x, latency=False).layers
    assert other.response is None
    assert first.response == once.lowrank_pl_record["responses"]["0"]["fitted"]  # nothing was held back
    twice = compress(once, "svd", RankFraction(0.25), both[1], data=[x])
    assert list(twice.lowrank_pl_record["responses"]) == ["1"]
    assert [layer.structure == "dense" for layer in summarize(net, twice, x, latency=False).layers] == [False, False]
