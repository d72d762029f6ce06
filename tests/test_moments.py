"""Second moments against plain float64 sums over all rows, and on networks of all kinds."""

import copy
import warnings

import pytest
import torch
from cases import LAYERS, make_layer
from torch import nn

from lowrank_pl import SVD, FixedRank, RankFraction, Samples, Targets, compress, make_plan, moments
from lowrank_pl.adapters import Attention, Recurrent, RowBlocks, find_maps, registry
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import lowered_inputs, spec_of
from lowrank_pl.methods.collecting import collect
from lowrank_pl.metric import columns_of
from lowrank_pl.moments import Moments, listening, warn_of_few

ALL = Targets(skip_first=False, skip_last=False, embeddings=True)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.abs().max()))


@pytest.mark.parametrize("size", [5, 300])
def test_sums(size):
    """Streamed in parts or at once."""
    layer = LayerSpec("linear", 2 * size, 6, groups=2)
    x, y = randn(2, 50, size) + 1, randn(2, 50, 3, seed=1)
    m = Moments(layer)
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        m.add(x[:, part].float(), y[:, part].float())
    x, y = x.float().double(), y.float().double()
    assert m.count == 50
    exact(m.second, torch.einsum("gni,gnj->gij", x, x))
    exact(m.cross, torch.einsum("gni,gnj->gij", y, x))
    exact(m.mean, x.mean(1))
    exact(m.mean_y, y.mean(1))
    assert m.squares == pytest.approx(float(y.square().sum()), rel=1e-11)
    exact(m.covariance(), torch.stack([torch.cov(each.T, correction=0) for each in x]))
    cross, second = m.of_pairs(centred=True)
    exact(cross, (y - y.mean(1, keepdim=True)).mT @ (x - x.mean(1, keepdim=True)) / 50)
    exact(second, m.covariance())
    w = randn(2, 4, size, seed=2)
    assert m.energy(w) == pytest.approx(float((x @ w.mT).square().sum()) / 50, rel=1e-11)
    exact(m.through(w), (x @ w.mT).mean(1))
    again = Moments.from_state_dict(layer, m.state_dict())
    assert again.state_dict().keys() == m.state_dict().keys()
    again.add(x, y)
    assert (again.count, m.count) == (100, 50)
    exact(m.second, torch.einsum("gni,gnj->gij", x, x))


@pytest.mark.parametrize("longest", [3, 8192])
def test_fading_is_a_weighted_sum(longest, monkeypatch):
    monkeypatch.setattr(moments, "LONGEST", longest)
    m, layer = Moments(LayerSpec("linear", 4, 3)), LayerSpec("linear", 4, 3)
    first, second = randn(1, 6, 4), randn(1, 5, 4, seed=1)
    m.add(first, first[..., :3] if longest > 4 else None)
    m.fade(0.25)
    m.add(second, second[..., :3] if longest > 4 else None)
    assert m.count == 0.25 * 6 + 5
    expected = Moments(layer)
    monkeypatch.setattr(moments, "LONGEST", 8192)
    expected.add(torch.cat([first * 0.5, second], 1))
    exact(m.second.mT @ m.second if longest == 3 else m.second, expected.second)
    exact(m.first, 0.25 * first.sum(1) + second.sum(1))


def test_long_inputs_keep_the_longest_directions_and_the_trace(monkeypatch):
    monkeypatch.setattr(moments, "LONGEST", 20)
    monkeypatch.setattr(moments, "ROWS", 16)
    layer = LayerSpec("linear", 40, 3)
    x = randn(1, 300, 40) * torch.logspace(0, -3, 40, dtype=torch.float64)
    m = Moments(layer)
    for part in x.split(100, dim=1):  # each longer than all that may be kept
        m.add(part)
        assert m.second.shape[1] <= 32
    exactly = x.mT @ x
    trace = float(m.second.square().sum() + 40 * m.floor.sum())
    assert trace == pytest.approx(float(exactly.diagonal(dim1=1, dim2=2).sum()), rel=1e-12)
    assert float((m.second.mT @ m.second - exactly).norm()) <= 0.02 * float(exactly.norm())
    w = randn(1, 3, 40, seed=2)
    assert m.energy(w) == pytest.approx(float((x @ w.mT).square().sum()) / 300, rel=0.05)
    assert m.metric().squared_norm(w[0]) == pytest.approx(m.energy(w), rel=1e-4)
    half = copy.copy(m)
    half.fade(0.5)
    assert half.energy(w) == pytest.approx(m.energy(w))


@pytest.mark.parametrize("mode", [None, "outputs", "asymmetric"])
def test_long_inputs_give_nearly_the_same_network(mode, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    x = randn(200, 60) * torch.logspace(0, -2, 60, dtype=torch.float64)
    run = lambda: compress(  # noqa: E731
        net.requires_grad_(False), "svd", FixedRank(6), ALL, data=list(x.split(50)), reconstruct=mode
    )
    expected = run()(x)
    monkeypatch.setattr(moments, "LONGEST", 20)
    monkeypatch.setattr(moments, "ROWS", 45)
    error = float((run()(x) - expected).norm() / expected.norm())
    lost = float((net(x) - expected).norm() / expected.norm())
    assert error < 0.8 * lost


def test_nan_names_the_layer_and_the_batch():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    batches = [torch.randn(5, 4) for _ in range(5)]
    batches[3][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Layer '0', batch 3 of the data: NaN or Inf in its inputs$"):
        compress(net, "svd", data=batches)
    m = Moments(LayerSpec("linear", 4, 3))
    with pytest.raises(ValueError, match="NaN or Inf"):
        m.add(torch.tensor([[[1.0, 2, torch.inf, 0], [1.0, 2, -torch.inf, 0]]]))
    assert m.count == 0


def test_fewer_vectors_than_inputs():
    net = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 3))
    x = torch.randn(1, 7, 40)
    with pytest.warns(UserWarning, match=r"3 of 3 layers .* \(layer '0': 7 of 40\)"):
        out = compress(net, "svd", FixedRank(5), ALL, data=[x], reconstruct="asymmetric")
    assert torch.isfinite(out(x)).all()
    m = Moments(LayerSpec("linear", 12, 3))
    m.add(randn(1, 12, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few({"a": m})


@pytest.mark.parametrize("name", LAYERS)
def test_what_layers_are_given_in_a_network(name):
    """By hooks, over two batches of which the second one has another shape where the layer has axes."""
    layer, x = make_layer(name)
    net, spec = nn.Sequential(layer), spec_of(layer)
    plan = make_plan(net, SVD(), RankFraction(1.0), ALL)
    other = torch.cat([x, x.flip(-1)], -1) if spec.kernel else x.flip(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m = collect(net, plan.compressions, Samples([x, other], places=None)).fitted["0"]
    rows = torch.cat([lowered_inputs(each, spec, None, torch.Generator()) for each in (x, other)], 1)
    assert rows.shape[-1] == columns_of(spec)
    assert m.count == rows.shape[1]
    exact(m.second, torch.einsum("gni,gnj->gij", rows, rows))


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x.flip(1), x.square())[0]


class LastHidden(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(6, 8, 2, **options)

    def forward(self, x):
        return self.rnn(x)[0]


def heard(net, x, names):
    found = {}
    with torch.no_grad(), listening(net, names, lambda name, _, rows: found.setdefault(name, []).append(rows)):
        net.eval()(x)
    return {name: torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in parts]) for name, parts in found.items()}


def test_attention_is_heard_inside():
    """The outputs' projection is given the values that heads attend to, not the queries."""
    net, x = Attending().double(), randn(3, 5, 8)
    names = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]
    found = heard(net, x, names)
    exact(found[names[0]], x.flatten(0, 1))
    exact(found[names[1]], x.flip(1).flatten(0, 1))
    exact(found[names[2]], x.square().flatten(0, 1))
    own = net.attention.out_proj
    exact(nn.functional.linear(found[names[3]], own.weight, own.bias).detach(), net(x).flatten(0, 1).detach())
    few = {**heard(net, x, names[:1])}
    assert list(few) == names[:1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_heard_inside(kind):
    """Each step's hidden state is what the next one's matrix is given."""
    net, x = LastHidden(kind).double(), randn(4, 3, 6)
    found = heard(net, x, [name for name, _ in find_maps(net).items()])
    exact(found["rnn.weight_ih_l0"], x.flatten(0, 1))
    outputs = net(x).detach()
    exact(found["rnn.weight_hh_l1"], torch.cat([torch.zeros_like(outputs[:1]), outputs[:-1]]).flatten(0, 1))
    assert found["rnn.weight_ih_l1"].shape == (12, 8)


def test_blocks_of_rows_are_heard(monkeypatch):
    adapters = list(registry._adapters)
    monkeypatch.setattr(registry, "_adapters", adapters)
    adapters.insert(0, RowBlocks(Recurrent(), {"weight_?h_*": 4}))
    adapters.insert(0, RowBlocks(Attention(), {"[qkv]_proj": 2}))
    x = torch.randn(4, 5, 6)
    for net, x in ((LastHidden(nn.LSTM), torch.randn(20, 5, 6)), (Attending(), torch.randn(20, 5, 8))):
        out = compress(net, "svd", FixedRank(1), ALL, data=[x], reconstruct="asymmetric")
        responses = out.lowrank_pl_record["responses"]
        assert len(responses) == len(out.lowrank_pl_record["layers"]) > 0
        assert all(0 <= each["fitted"] < 1.5 for each in responses.values())
