"""Finding, listening, copying and replacing, on module trees of every awkward kind."""

import copy
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import Net, images, weights
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import FixedRank, make_plan
from lowrank_pl.adapters import find_maps, obstacles
from lowrank_pl.names import clean_name
from lowrank_pl.surgery import detached_copy, num_parameters, replace_layers
from lowrank_pl.tracing import Recorder, Trace, record, run


class Twice(nn.Module):
    """One convolution on two sizes, a linear layer on tokens, images folded into the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.tokens, self.folded = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Conv2d(1, 2, 3, stride=2)

    def forward(self, x):
        y = self.conv(x).mean((2, 3)) + self.conv(input=x[:, :, ::2]).mean((2, 3))
        tokens = self.tokens(self.conv(x).flatten(2).mT)
        return y.sum(1) + tokens.sum((1, 2)) + self.folded(x.flatten(0, 1)[:, None]).sum((1, 2, 3)).view(-1, 3).sum(1)


def macs(model, x):
    trace = record(model, x)
    return {name: each.layer.with_(inputs=trace.inputs(name)).macs for name, each in find_maps(model).items()}


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Twice(), torch.randn(4, 3, 9, 8)),
        (Net(), images(1)[0]),
        (nn.Sequential(nn.Conv1d(3, 6, 3, groups=3), nn.ConvTranspose1d(6, 4, 5, stride=2)), torch.randn(2, 3, 11)),
    ],
    ids=["twice", "net", "conv1d"],
)
def test_macs_are_those_that_pytorch_counts(model, x):
    assert sum(macs(model, x).values()) * len(x) == counted(model, x)


def test_calls_are_per_input_of_the_network():
    trace = record(Twice(), torch.randn(4, 3, 9, 8))
    assert trace.batch == 4
    assert sorted(trace.inputs("conv")) == [(1, 5, 8), (2, 9, 8)]
    assert trace.inputs("tokens") == ((42,),)
    assert trace.inputs("folded") == ((3, 9, 8),)
    assert trace.inputs("nothing") == ()


def test_find_maps():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Conv2d(1, 1, 1)), "c": nn.BatchNorm1d(3)})
    assert list(find_maps(model)) == ["a", "b.1"]
    assert find_maps(model)["a"].module is shared
    compiled = nn.Sequential(torch.compile(Net()))
    assert list(find_maps(compiled)) == [f"0.{name}" for name in find_maps(Net())]
    assert clean_name("_orig_mod.net._orig_mod.fc1") == "net.fc1"


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.Linear):
    pass


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_obstacles():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    free = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(free[0], "weight", Doubled())
    cases = [
        (tied, "tied"),
        (nn.Sequential(Own(4, 4)), "a Own with a forward of its own"),
        (nn.Sequential(nn.LazyLinear(4)), "lazy"),
        (free, "without a way back"),
    ]
    for model, reason in cases:
        assert reason in obstacles(model)["0"]
    assert obstacles(tied).keys() == {"0", "1"}
    assert obstacles(nn.Sequential(Renamed(4, 4), nn.Conv2d(1, 1, 1))) == {}


def test_odd_calls_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.never = nn.ConvTranspose1d(2, 2, 3, stride=2), nn.Linear(2, 2)

        def forward(self, x):
            return self.up(x, output_size=[12])

    trace = record(Odd(), torch.randn(1, 2, 5))
    assert trace.odd == {"up": "called with more than one argument"}
    assert trace.calls == {}


def test_checkpointed_layers_are_counted_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=False))

    model = Checkpointed()
    recorder = Recorder(model, 5)
    model(torch.randn(5, 6, requires_grad=True)).sum().backward()
    trace = recorder.stop()
    assert trace.inputs("first") == trace.inputs("second") == ((1,),)


def test_layers_that_swin_never_calls_are_heard_by_their_weights():
    model = torchvision.models.swin_t(weights=None).eval()
    trace = record(model, torch.randn(1, 3, 64, 64))
    called = []
    for name, each in find_maps(model).items():
        each.module.register_forward_hook(lambda *_, name=name: called.append(name))
    run(model, torch.randn(1, 3, 64, 64))
    silent = [name for name in trace.calls if name not in called]
    assert silent
    assert all(name.endswith((".qkv", ".proj")) for name in silent)
    tables = {name for name in find_maps(model) if name not in trace.calls}
    assert all(name.endswith("relative_position_bias_table") for name in tables)


def test_a_compiled_model_is_heard_and_runs_compiled_again():
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    model = torch.compile(Net(), backend=backend)
    x = images(1)[0]
    recorder = Recorder(model, len(x))
    model(x)
    trace = recorder.stop()
    assert list(trace.calls) == ["conv1", "conv2", "fc1", "fc2"]
    assert not calls
    model(x)
    assert calls


def test_batch_norm_is_noticed_only_right_behind():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            x = self.norms[0](self.one(x))
            x = self.norms[1](F.relu(self.two(x)))
            return self.norms[2](self.three(x) + 0.0)

    assert record(Mixed(), torch.randn(2, 3, 4, 4)).normed == ["one"]


def test_the_trace_survives_a_checkpoint(tmp_path):
    trace = record(Twice(), torch.randn(4, 3, 9, 8))
    torch.save(trace.state_dict(), tmp_path / "trace.pt")
    again = Trace.from_state_dict(torch.load(tmp_path / "trace.pt", weights_only=True))
    assert (again.calls, again.odd, again.batch, again.normed) == (trace.calls, trace.odd, trace.batch, trace.normed)
    assert again.samples == {}
    part = record(nn.Sequential(nn.Identity(), Twice()), torch.randn(4, 3, 9, 8)).under("1")
    assert part.calls == trace.calls
    assert set(part.samples) == {"conv", "tokens", "folded"}


def test_recording_leaves_no_trace_behind():
    model = Net(norm=True, dropout=0.5).train()
    before, state = weights(model), torch.get_rng_state()
    record(model, images(1)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        record(model, torch.randn(2, 99, 3, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_detached_copy():
    model = Net()
    model.trainer = trainer = object()
    model.last = {"loss": (model.fc2.weight * 2).sum()}  # not a leaf: refuses a deep copy
    clone = detached_copy(model, shared=(trainer,))
    assert clone.trainer is trainer
    assert torch.equal(clone.last["loss"], model.last["loss"].detach())
    assert clone.last["loss"].grad_fn is None
    assert clone.fc1.weight is not model.fc1.weight
    unwrapped = detached_copy(nn.Sequential(torch.compile(Net())))
    assert type(unwrapped[0]) is Net
    assert type(detached_copy(torch.compile(Net()))) is Net


def test_replace_layers():
    shared, other = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    assert replace_layers(model, {shared: other}) is model
    assert model["a"] is other
    assert model["b"][0] is other
    assert replace_layers(shared, {shared: other}) is other
    assert num_parameters(model) == 12


def seconds(work):
    """Of this process alone, the least of three: other programs on the machine do not count."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def many(layers):
    return nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers))


def test_time_for_a_plan_grows_with_the_layers_not_with_their_square():
    """Eight times as many take eight times as long; 64 times would be the square."""
    for work in (obstacles, lambda net: make_plan(net, "svd", FixedRank(1))):
        few, more = (seconds(partial(work, many(n))) for n in (500, 4000))
        assert more < 24 * few


def test_a_plan_for_ten_thousand_layers():
    net = many(10_000)
    start = time.process_time()
    plan = make_plan(net, "svd", FixedRank(1))
    assert time.process_time() - start < 15
    assert len(plan.compressions) == 9_999  # the last one stays dense
    assert list(plan.dense) == ["9999"]
