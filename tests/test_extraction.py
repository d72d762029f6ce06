"""`compress`: a verified copy made of factors."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import PROJECTIONS, Net, distance, images, weights
from torch import nn
from torch.nn.utils import parametrizations

from lowrank_pl import (
    SVD,
    BlockSVD,
    CostBudget,
    FixedRank,
    GreedyEnergy,
    SpatialSVD,
    Targets,
    TiledSVD,
    compress,
    load_compressed,
    make_plan,
    save_compressed,
)
from lowrank_pl.compression import write_weights_
from lowrank_pl.decompositions import Choice
from lowrank_pl.extraction import difference, extract
from lowrank_pl.layers import FactorChain, TiledLayer, TTLayer, tiled
from lowrank_pl.structures import Structure
from lowrank_pl.tracing import Call, record

X = images(2)[0]
EVERYTHING = Targets(skip_first=False, skip_last=False)
RANK = FixedRank(2)


def notes(model):
    return model.lowrank_pl_record["notes"]


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize(
    ("method", "reference"),
    [("svd", "svd"), (SpatialSVD(), "spatial_svd"), (TiledSVD(8), "tiled_svd"), (BlockSVD(4), "block_svd")],
)
def test_output_is_the_projected_networks(method, reference, example):
    net = Net(norm=True).eval()
    before, projected = weights(net), copy.deepcopy(net)
    small = compress(net, method, RANK, example_input=example)
    with torch.no_grad():
        for name in ("conv2", "fc1"):
            weight = projected.get_submodule(name).weight
            weight.copy_(PROJECTIONS[reference](weight, 2))
        assert torch.allclose(small(X), projected(X), rtol=1e-4, atol=1e-6)
    assert distance(before, weights(net)) == 0
    assert isinstance(net.conv2, nn.Conv2d)


def test_the_original_is_untouched():
    net = Net(norm=True, dropout=0.5).train()
    net.conv2.eval()
    net.fc1.weight.requires_grad_(False)
    modes = {n: m.training for n, m in net.named_modules()}
    before, random = weights(net), torch.get_rng_state()
    small = compress(net, "svd", RANK, example_input=X)
    assert modes == {n: m.training for n, m in net.named_modules()}
    assert distance(before, weights(net)) == 0
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*net.modules(), *small.modules()])
    mine = {p.data_ptr() for p in net.parameters()}
    assert not any(p.data_ptr() in mine for p in small.parameters())
    assert {n: m.training for n, m in small.named_modules() if n in modes} == modes


def test_frozen_networks_are_compressed_and_stay_frozen():
    small = compress(Net().requires_grad_(False), "svd", RANK)
    assert isinstance(small.conv2, nn.Sequential)
    assert not any(p.requires_grad for p in small.parameters())
    assert all(p.requires_grad for p in compress(Net(), "svd", RANK).parameters())


def test_bf16_networks():
    net = Net().bfloat16()
    small = compress(net, "svd", RANK, example_input=X.bfloat16())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert torch.isfinite(small(X.bfloat16())).all()


def test_float64_networks():
    net = Net().double().eval()
    small = compress(net, "svd", RANK, example_input=X.double()).eval()
    with torch.no_grad():
        for name in ("conv2", "fc1"):
            weight = net.get_submodule(name).weight
            weight.copy_(PROJECTIONS["svd"](weight, 2))
        assert torch.allclose(small(X.double()), net(X.double()), atol=1e-12)


def test_mappings():
    small = compress(
        Net(),
        {"conv2": TiledSVD(8, run="factors"), "*": SVD()},
        {"fc1": FixedRank(3), "conv2": FixedRank(1)},
    )
    assert isinstance(small.conv2, TiledLayer)
    assert small.conv2.rank == 1
    assert small.fc1[0].out_features == 3
    partial = compress(Net(), {"conv2": "svd"}, RANK)
    assert notes(partial)["fc1"] == "no pattern in `method` matches it"


def test_first_match_wins():
    small = compress(Net(), "svd", {"conv*": FixedRank(1), "conv2": FixedRank(4), "*": FixedRank(2)})
    assert small.conv2[0].out_channels == 1
    assert small.fc1[0].out_features == 2


def test_nothing_gets_cheaper():
    with pytest.warns(UserWarning, match="stay dense"):
        small = compress(Net(), "svd", FixedRank(1000))
    assert distance(weights(small), weights(Net())) == 0
    assert notes(small)["conv2"] == "svd of rank 12 has 1,008 weights"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(Net(), "svd", RANK)


@pytest.mark.parametrize(
    "arguments",
    [{"targets": Targets(include=["none"])}, {"method": {"none": "svd"}}, {"rank": {"none": RANK}}],
)
def test_patterns_that_match_nothing(arguments):
    with pytest.raises(ValueError, match=r"'none'.*conv1, conv2"):
        compress(Net(), **arguments)


def test_weights_that_are_not_finite():
    net = Net()
    with torch.no_grad():
        net.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc1"):
        compress(net, "svd", RANK)


# -- layers that stay dense ----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Everything that cannot be replaced, and one layer that can."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.idle = nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)

    def forward(self, x):
        x = self.plain(x.flatten(1)[:, :64].reshape(-1, 4, 16))
        x = self.attention(x, x, x, need_weights=False)[0]
        return F.linear(self.normed(self.two(self.one(x))), self.read.weight)


def test_reasons():
    small = compress(Odd(), "svd", RANK, EVERYTHING, example_input=X)
    expected = {
        "one": "tied",
        "two": "tied",
        "idle": "never called",
    }
    for name, words in expected.items():
        assert words in notes(small)[name], name
        assert isinstance(small.get_submodule(name), nn.Linear)
    for name in ("plain", "normed", "read", "attention.q_proj", "attention.out_proj"):
        assert isinstance(small.get_submodule(name), FactorChain), name
    assert small.two.weight is small.one.weight
    odd = Odd().eval()
    odd.load_state_dict(Odd().state_dict())
    assert small.eval()(X).shape == odd(X).shape


def test_reasons_without_an_input():
    small = compress(Odd(), "svd", RANK, EVERYTHING)
    assert isinstance(small.attention.out_proj, FactorChain)
    assert isinstance(small.idle, nn.Sequential)


def test_lazy_layers():
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.LazyLinear(8), nn.LazyConv2d(4, 3))
    small = compress(net, "svd", RANK, EVERYTHING)
    assert "lazy" in notes(small)["2"]
    assert "lazy" in notes(small)["3"]
    assert isinstance(small[2], nn.LazyLinear)
    assert isinstance(small[0], nn.Sequential)


def test_an_example_leaves_lazy_layers_of_the_original_lazy():
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.Linear(16, 16))
    compress(net, "svd", RANK, EVERYTHING, example_input=X)
    assert isinstance(net[1], nn.LazyLinear)


def test_layers_with_a_forward_of_their_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    small = compress(nn.Sequential(Scaled(16, 16), nn.Linear(16, 16)), "svd", RANK, EVERYTHING)
    assert "Scaled" in notes(small)["0"]
    assert isinstance(small[0], Scaled)


def test_shared_modules_are_replaced_once_everywhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.block = nn.ModuleDict({"again": self.inner})

        def forward(self, x):
            return self.block["again"](self.inner(x))

    x = torch.randn(3, 16)
    small = compress(Twice(), "svd", RANK, EVERYTHING, example_input=x)
    assert isinstance(small.inner, nn.Sequential)
    assert small.inner is small.block["again"]


def test_a_model_that_is_one_layer():
    layer = nn.Linear(16, 16)
    small = compress(layer, "svd", RANK, EVERYTHING, example_input=torch.randn(2, 16))
    assert isinstance(small, nn.Sequential)
    assert isinstance(layer, nn.Linear)


def test_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    arguments = torch.randn(2, 16), torch.randn(2, 16)
    small = compress(Sum(), "svd", RANK, EVERYTHING, example_input=arguments)
    assert small(*arguments).shape == (2, 16)
    assert isinstance(small.a, nn.Sequential)


def test_the_order_of_running_counts():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.inner = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.last(self.inner(x))

    assert notes(compress(Backwards(), "svd", RANK))["inner"] == "the last linear layer"
    with_input = compress(Backwards(), "svd", RANK, example_input=torch.randn(2, 16))
    assert notes(with_input)["last"] == "the last linear layer"


# -- verification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1e-3, float("nan")])
@pytest.mark.parametrize("example", [None, X])
def test_a_module_that_is_not_its_structure_is_found(monkeypatch, example, amount):
    original = Structure.to_module

    def broken(self, bias):
        module = original(self, bias)
        if self.layout.layer.kind == "linear":
            with torch.no_grad():
                module[1].weight.mul_(1 + amount)
        return module

    monkeypatch.setattr(Structure, "to_module", broken)
    with pytest.raises(RuntimeError, match="'fc1'"):
        compress(Net(), "svd", RANK, example_input=example)


@pytest.mark.parametrize("run", ["factors", "dense"])
def test_both_ways_of_running_tiles_are_verified(monkeypatch, run):
    name = {"factors": "run_lowered", "dense": "run_dense"}[run]
    original = getattr(tiled, name)
    monkeypatch.setattr(tiled, name, lambda *arguments: original(*arguments) * 1.001)
    with pytest.raises(RuntimeError, match="conv2"):
        compress(Net(), TiledSVD(8), RANK, example_input=X)


@pytest.mark.parametrize("way", ["_by_cores", "dense_weight"])
def test_both_ways_of_running_trains_are_verified(monkeypatch, way):
    small = compress(Net(), "tensor_train", RANK, example_input=X)
    assert isinstance(small.fc1, TTLayer)
    assert (
        notes(small)["fc1"]
        == {"factors": "runs from its factors", "dense": "stored as factors, runs dense"}[small.fc1.run]
    )
    original = getattr(TTLayer, way)
    monkeypatch.setattr(TTLayer, way, lambda self, *x: original(self, *x) * 1.001)
    with pytest.raises(RuntimeError, match="fc1"):
        compress(Net(), "tensor_train", RANK, example_input=X)


def test_biases_are_verified(monkeypatch):
    original = Structure.to_module
    monkeypatch.setattr(Structure, "to_module", lambda self, bias: original(self, None))
    with pytest.raises(RuntimeError, match="conv2"):
        compress(Net(), "svd", RANK)


def test_layers_of_zeros_and_tiny_outputs():
    net = Net()
    with torch.no_grad():
        net.conv2.weight.zero_()
        net.conv2.bias.zero_()
        net.fc1.weight.mul_(1e-30)
        net.fc1.bias.zero_()
    small = compress(net, "svd", RANK, example_input=X)
    assert isinstance(small.conv2, nn.Sequential)
    assert float(small.conv2(torch.randn(1, 8, 8, 8)).abs().max()) == 0


def test_structures_of_an_older_projection_are_what_is_taken():
    """`extract` factors nothing: what it is given is what it deploys."""
    net = Net()
    plan = make_plan(net, "svd", RANK)
    structures = plan.factor({"conv2": Choice(SVD(), (1,)), "fc1": Choice(SVD(), (5,))})
    small = extract(net, plan, structures, {"conv2": "as of old"})
    assert small.conv2[0].out_channels == 1
    assert small.fc1[0].out_features == 5
    assert notes(small) == {**plan.dense, "conv2": "as of old", "fc1": ""}


def test_hooks_and_attributes_survive():
    net = Net()
    net.note = {"labels": ["a", "b"]}
    small = compress(net, "svd", RANK)
    assert small.note == net.note
    assert small.note is not net.note


def test_compiled_networks_are_unwrapped():
    small = compress(torch.compile(Net(), backend="eager"), "svd", RANK, example_input=X)
    assert type(small) is Net
    assert set(notes(small)) == {"conv1", "conv2", "fc1", "fc2"}
    assert isinstance(small.conv2, nn.Sequential)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(6, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 4)

    def forward(self, x, mask=None):
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask)[:, 0])


@pytest.mark.parametrize("method", ["svd", TiledSVD(16)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoders_in_evaluation(method, masked, tmp_path):
    """Where PyTorch's own fast path goes past the layers' forward."""
    net, x = Encoder().eval(), torch.randn(2, 8, 6)
    mask = torch.tensor([[False] * 8, [False] * 6 + [True] * 2]) if masked else None
    small = compress(net, method, FixedRank(4), example_input=x)
    assert isinstance(net.encoder.layers[0].linear1, nn.Linear)
    assert not isinstance(small.encoder.layers[1].linear2, nn.Linear)
    projected = copy.deepcopy(net)
    plan = make_plan(projected, method, FixedRank(4), trace=record(projected, x))
    write_weights_(plan, plan.factor(plan.choose_ranks()))
    save_compressed(small, tmp_path)
    loaded = load_compressed(Encoder(), tmp_path).eval()
    with torch.no_grad():
        expected = projected(x, mask)
        for model in (small, loaded):
            assert torch.allclose(model(x, mask), expected, rtol=1e-3, atol=1e-5)


def test_a_layer_whose_weight_another_module_reads_stays_dense():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.c(self.b(self.a(x))) + self.b.weight.mean()

    net, x = Reads(), torch.randn(2, 32)
    small = compress(net, "svd", FixedRank(4), EVERYTHING, example_input=x)
    small(x)
    assert [name for name, child in small.named_children() if isinstance(child, nn.Linear)] == ["b"]
    assert notes(small)["b"] == "its weight is read by another module, too"
    assert type(net.b._parameters) is dict


def test_an_example_that_is_not_finite_is_not_verified_on():
    x = torch.full_like(X, torch.nan)
    assert isinstance(compress(Net(), "svd", RANK, example_input=x).fc1, nn.Sequential)


def test_keywords_are_compared_as_a_whole(monkeypatch):
    class Keyed(Net):
        def forward(self, *, x):
            return super().forward(x)

    net, x = Keyed().eval(), images(1)[0]
    small = compress(net, "svd", FixedRank(2), example_input=Call(kwargs={"x": x}))
    assert difference(net, small, Call(kwargs={"x": x})).startswith("outputs differ")
    assert difference(small, small, Call(kwargs={"x": x})) is None


@pytest.mark.parametrize("rank", [CostBudget("params", 0.5), GreedyEnergy("params", 0.5)])
def test_a_budget_without_layers_is_refused(rank):
    """Not met in silence by a network that stays dense."""
    with pytest.raises(ValueError, match=r"0\.5 cannot be reached: no layer takes part \(the last linear layer\)"):
        compress(nn.Sequential(nn.Linear(8, 8)), "svd", rank)
