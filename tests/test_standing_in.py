"""Deployed layers in place of those that a network's own code asks, hooks and compresses again."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images
from torch import nn

from lowrank_pl import FixedRank, Targets, TensorTrain, TiledSVD, compress, load_compressed, save_compressed, summarize
from lowrank_pl.extraction import extract
from lowrank_pl.layers import ConstantLayer, FactorChain, GroupedLinear, LazyWeight, TiledLayer, TTLayer
from lowrank_pl.planning import make_plan
from lowrank_pl.structures import Constant

X = images(2)[0]
RANK = FixedRank(2)
EVERYTHING = Targets(skip_first=False, skip_last=False)


def notes(model):
    return model.lowrank_pl_record["notes"]


class Asking(nn.Module):
    """Asks its layers what Whisper, T5, CLIP and LeViT ask theirs."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 16, 3, stride=2, padding=1)
        self.wo = nn.Linear(16, 16)

    def forward(self, x):
        assert x.shape[2] % (self.conv1.stride[0] * self.conv2.stride[0]) == 0
        x = self.conv2(self.conv1(x.to(self.conv1.weight.dtype))).transpose(1, 2)
        weight = self.wo.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:
            x = x.to(weight.dtype)
        assert (self.wo.in_features, self.conv2.kernel_size, self.conv2.groups) == (16, (3,), 1)
        assert self.wo.weight.shape[0] == self.wo.out_features == len(self.wo.weight)
        assert self.wo.bias.device == self.wo.weight.device
        return self.wo(x)


def test_questions_are_no_reads_and_are_answered(tmp_path):
    net, x = Asking().eval(), torch.randn(2, 8, 8)
    small = compress(net, "svd", RANK, EVERYTHING, example_input=x)
    assert {type(child) for child in small.children()} == {FactorChain}
    save_compressed(small, tmp_path)
    assert torch.equal(load_compressed(Asking(), tmp_path).eval()(x), small(x))
    assert torch.jit.script(small.wo)(x[:, 0].repeat(1, 2)).shape == (2, 16)
    assert torch.equal(torch.compile(small, backend="eager")(x), small(x))


@pytest.mark.parametrize(
    "read", [lambda w: w.mean(), lambda w: w[0, 0], lambda w: (w @ w.T).sum(), lambda w: w.data.sum()]
)
def test_reads_are_reads(read):
    class Reads(Asking):
        def forward(self, x):
            return super().forward(x) + read(self.wo.weight)

    small = compress(Reads(), "svd", RANK, EVERYTHING, example_input=torch.randn(2, 8, 8))
    assert notes(small)["wo"] == "its weight is read by another module, too"
    assert isinstance(small.wo, nn.Linear)


@pytest.mark.parametrize(
    "method", ["svd", TiledSVD(8), TiledSVD(8, "factors"), TensorTrain(), TensorTrain(None, "dense")]
)
def test_the_weight_of_factors_is_their_product(method):
    """Without an example nobody knows that a weight is read: what is read is right, and gradients reach factors."""
    net = nn.Sequential(nn.Linear(16, 32), nn.Conv2d(16, 8, 3))
    small = compress(net, method, RANK, EVERYTHING)
    x, y = torch.randn(4, 16), torch.randn(2, 16, 5, 5)
    assert isinstance(small[0].weight, LazyWeight)
    assert torch.allclose(F.linear(x, small[0].weight, small[0].bias), small[0](x), atol=1e-5)
    assert torch.allclose(F.conv2d(y, small[1].weight, small[1].bias), small[1](y), atol=1e-5)
    small[0].weight.square().sum().backward()
    assert all(p.grad is not None for name, p in small[0].named_parameters() if "bias" not in name)
    assert small[0].weight.requires_grad
    assert small.double()[1].weight.dtype == torch.float64
    assert copy.deepcopy(small)[1].weight.shape == (8, 16, 3, 3)


def test_the_weight_of_a_constant():
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    plan = make_plan(net, "svd", RANK, EVERYTHING)
    structures = plan.factor(plan.choose_ranks())
    layout = Constant(plan.compressions[0].layer)
    structures["0"] = replace(structures["0"], layout=layout, tensors=(torch.empty(0),))
    small = extract(net, plan, structures, {})
    assert isinstance(small[0], ConstantLayer)
    assert small[0].in_features == 16
    assert torch.equal(small[0].weight, torch.zeros(32, 16))


# -- the modes in which a network is heard -------------------------------------------------------------------------


class TwoPaths(nn.Module):
    """A layer whose weight is read in training alone, as Mamba's kernels do, and one that runs in training alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aside, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.a(x)
        if self.training:
            return self.head(F.linear(x, self.b.weight * 1, self.b.bias)), self.aside(x)
        return self.head(self.b(x))


def test_a_network_in_training_mode_is_heard_in_training_too():
    x, net, random = torch.randn(4, 16), TwoPaths(), torch.get_rng_state()
    small = compress(net, "svd", RANK, EVERYTHING, example_input=x)
    assert isinstance(small.b, nn.Linear)
    assert "read" in notes(small)["b"]
    assert isinstance(small.aside, FactorChain)
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(compress(TwoPaths().eval(), "svd", RANK, EVERYTHING, example_input=x).b, FactorChain)


def test_a_network_that_runs_in_training_alone():
    class TrainingOnly(TwoPaths):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("call sample() instead")
            return self.head(self.b(self.a(x)))

    x = torch.randn(4, 16)
    assert isinstance(compress(TrainingOnly(), "svd", RANK, EVERYTHING, example_input=x).b, FactorChain)
    with pytest.raises(ValueError, match="call sample"):
        compress(TrainingOnly().eval(), "svd", RANK, example_input=x)


def test_one_input_for_a_network_with_batch_norm():
    """Training refuses it; evaluation is enough."""
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    assert isinstance(compress(net, "svd", RANK, EVERYTHING, example_input=torch.randn(1, 16))[0], FactorChain)


# -- what hangs on a layer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", TiledSVD(8)])
def test_hooks_are_carried_over(method, tmp_path):
    def hooked():
        net = Net()
        net.fc1.register_forward_hook(lambda module, args, y: 2 * y)
        net.fc1.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
        net.fc1.register_full_backward_hook(lambda module, gi, go: backward.append(module))
        return net.eval()

    backward = []
    small, plain = compress(hooked(), method, RANK, example_input=X), compress(Net().eval(), method, RANK)
    with torch.no_grad():
        features = F.avg_pool2d(torch.tanh(plain.conv2(torch.tanh(plain.conv1(X)))), 2).flatten(1)
        expected = plain.fc2(torch.tanh(2 * plain.fc1(features + 1)))
    assert torch.allclose(small(X), expected, atol=1e-5)
    save_compressed(small, tmp_path)
    assert torch.allclose(load_compressed(hooked(), tmp_path)(X), expected, atol=1e-5)
    small(X).sum().backward()
    assert backward == [small.fc1]


def test_layers_with_parts_of_their_own_stay_dense():
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    net[0].observer = nn.Identity()
    net[1].scale = nn.Parameter(torch.ones(16))
    net[2].register_buffer("mask", torch.ones(16))
    net[3].label = "the head"  # a plain attribute
    small = compress(net, "svd", RANK, EVERYTHING)
    for i, name in enumerate(("observer", "scale", "mask")):
        assert notes(small)[str(i)] == f"has parts of its own: {name}"
        assert hasattr(small[i], name)
    assert isinstance(small[3], FactorChain)
    assert small[3].label == "the head"


# -- twice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["svd", TiledSVD(8)])
@pytest.mark.parametrize("first", ["svd", TiledSVD(8)])
def test_a_network_compressed_twice_is_saved_and_loaded(first, second, tmp_path):
    """What the first call left dense takes part in the second one; the rest stays as it is."""
    once = compress(Net().eval(), {"conv2": first}, FixedRank(3), example_input=X)
    twice = compress(once, second, RANK, EVERYTHING, example_input=X)
    assert torch.equal(next(twice.conv2.parameters()), next(once.conv2.parameters()))
    small = {"conv2", "fc1"} | ({"conv1", "fc2"} if second == "svd" else set())  # too small for tiles
    assert set(twice.lowrank_pl_record["layers"]) == small
    save_compressed(twice, tmp_path)
    assert torch.equal(load_compressed(Net(), tmp_path).eval()(X), twice(X))
    report = summarize(Net(), twice, X, latency=False)
    assert {layer.name for layer in report.layers if layer.structure != "dense"} == small


def test_a_part_that_was_compressed_before(tmp_path):
    class Outer(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.more = net, nn.Linear(4, 16)

        def forward(self, x):
            return self.more(self.net(x))

    small = compress(Outer(compress(Net(), "svd", RANK)), "svd", FixedRank(1), EVERYTHING)
    save_compressed(small, tmp_path)
    assert torch.equal(load_compressed(Outer(Net()), tmp_path)(X), small(X))


# -- other front ends of PyTorch -----------------------------------------------------------------------------------


FRONT_ENDS = {"script": torch.jit.script, "fx": torch.fx.symbolic_trace, "trace": lambda m: torch.jit.trace(m, X)}


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_grouped_layers_in_other_front_ends(batch):
    layer, x = GroupedLinear(6, 8, 2), torch.randn(*batch, 6)
    with torch.no_grad():
        for front in ("script", "fx"):
            assert torch.equal(FRONT_ENDS[front](layer)(x), layer(x))


@pytest.mark.parametrize("front", FRONT_ENDS)
@pytest.mark.parametrize("run", ["dense", "factors"])
@pytest.mark.parametrize(
    ("method", "kind"), [(partial(TiledSVD, 8), TiledLayer), (partial(TensorTrain, None), TTLayer)]
)
def test_rebuilding_layers_in_other_front_ends(front, run, method, kind, tmp_path):
    small = compress(Net().eval(), method(run), RANK, EVERYTHING)
    kept = [type(child) for child in small.children()]
    with torch.no_grad():
        module = FRONT_ENDS[front](small)
        assert torch.allclose(module(X), small(X), atol=1e-6)
        assert torch.allclose(module(X[:1]), small(X[:1]), atol=1e-6)
    assert [type(child) for child in small.children()] == kept
    assert kind in kept
    if front != "fx":
        module.save(tmp_path / "net.pt")
        assert torch.allclose(torch.jit.load(tmp_path / "net.pt")(X), small(X), atol=1e-6)
