"""Every kind of weight that is no plain layer: found, read, written, counted, trained, deployed, loaded again."""

import copy
import pickle
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import quiet_trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import (
    SVD,
    Adapter,
    BlockSVD,
    CostBudget,
    DeepTwist,
    Experts,
    ExtractStructure,
    FixedRank,
    LearningCompression,
    ReshapedParameters,
    Targets,
    TiledSVD,
    compress,
    load_compressed,
    make_plan,
    save_compressed,
    summarize,
)
from lowrank_pl.adapters import Attention as AttentionAdapter
from lowrank_pl.adapters import Recurrent as RecurrentAdapter
from lowrank_pl.adapters import RowBlocks, find_maps, obstacles, registry
from lowrank_pl.compression import write_weights_
from lowrank_pl.decompositions import DENSE, ZERO
from lowrank_pl.extraction import difference, extract
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import FactoredParameter, SplitAttention, SplitRecurrent
from lowrank_pl.tracing import FUSED, record

ALL = Targets(skip_first=False, skip_last=False, embeddings=True)


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Standardized(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Equalized(nn.Linear):
    """As StyleGAN's layers, whose learning rates are equal."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.1, self.bias)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT

    def right_inverse(self, w):
        return w.triu()


class Mixed(nn.Module):
    """A router, and experts that are read one by one, all at once, and as rows of a matrix."""

    def __init__(self, size=8):
        super().__init__()
        self.router = nn.Parameter(torch.randn(4, size))
        self.up = nn.Parameter(torch.randn(4, 12, size) / 3)
        self.down = nn.Parameter(torch.randn(4, 12, size) / 3)
        self.heads = nn.Parameter(torch.randn(6, size))
        self.position = nn.Parameter(torch.randn(1, 5, size))

    def forward(self, x):
        x = x + self.position
        share = F.linear(x, weight=self.router).softmax(-1)
        inner = [F.linear(x, self.up[i]) for i in range(4)]
        outer = torch.bmm(torch.stack([torch.relu(y).flatten(0, 1) for y in inner]), self.down)
        x = x + torch.einsum("btk,kbtc->btc", share, outer.unflatten(1, x.shape[:2]))
        first, second = self.heads.chunk(2)
        return torch.cat([x @ first.T, (second @ x.mT).mT], -1)


class MixtureOfExperts(nn.Module):
    """Every expert is read by itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 12, 8) / 3), nn.Parameter(torch.randn(4, 8, 12) / 3)

    def forward(self, x):
        return sum(F.linear(torch.relu(x @ self.up[i].T), self.down[torch.tensor(i)]) for i in range(4))


class Shared(nn.Module):
    """Weights of layers that others multiply by, as in torchvision's Swin and timm's EVA-02."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.linear((q @ k.mT).softmax(-1) @ v, weight=self.out.weight, bias=self.out.bias)


class Tied(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.table(x))))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(8, 10, 2, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 10), 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 4)
        self.memory = options.get("kdim", 8)

    def forward(self, x):
        memory = x[:, :3].repeat(1, 1, 2)[..., : self.memory]
        return self.head(self.attention(x, memory, memory)[0])


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 4))


TOKENS, IMAGES = (5, 8), (6, 7, 7)
spectral, normed = parametrizations.spectral_norm, parametrizations.weight_norm

# name: how it is made, the shape of one input (a number: so many tokens), the maps that take part
CASES = {
    "conv1d": (lambda: nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(6, 12)), TOKENS, ["0", "2"]),
    "standardized": (lambda: nn.Sequential(Standardized(6, 8, 3), nn.Tanh(), Standardized(8, 9, 3, stride=2)),
                     IMAGES, ["0", "2"]),
    "equalized": (lambda: nn.Sequential(Equalized(8, 12), nn.Tanh(), Equalized(12, 6)), TOKENS, ["0", "2"]),
    "weight_norm": (lambda: nn.Sequential(normed(nn.Conv2d(6, 8, 3)), nn.Tanh(), normed(nn.Linear(5, 4), dim=1)),
                    IMAGES, ["0", "2"]),
    "old_weight_norm": (lambda: nn.Sequential(weight_norm(nn.Conv2d(6, 8, 3)), nn.Tanh(), weight_norm(nn.Linear(5, 4))),
                        IMAGES, ["0", "2"]),
    "spectral_norm": (lambda: nn.Sequential(spectral(nn.ConvTranspose2d(6, 8, 3)), spectral(nn.Linear(9, 4))),
                      IMAGES, ["0", "1"]),
    "circular": (lambda: nn.Sequential(normed(nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"))), IMAGES, ["0"]),
    "experts": (Mixed, TOKENS, ["router", "up", "down", "heads"]),
    "shared": (Shared, TOKENS, ["qkv", "out"]),
    "tied": (lambda: Tied(False), 5, ["table", "inner"]),
    "tied_bias": (lambda: Tied(True), 5, ["table", "inner"]),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS, None),
    "lstm_proj": (lambda: Recurrent(nn.LSTM, proj_size=6), TOKENS, None),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS, None),
    "rnn": (lambda: Recurrent(nn.RNN, bias=False), TOKENS, None),
    "attention": (Attention, TOKENS, None),
    "attention_kdim": (lambda: Attention(kdim=6, vdim=6, bias=False), TOKENS, None),
    "encoder": (encoder, TOKENS, None),
}  # fmt: skip
# whose projections have parameters that give them exactly
EXACT = [name for name in CASES if name not in ("standardized", "spectral_norm")]


def make(name, batch=4):
    torch.manual_seed(0)
    build, shape, maps = CASES[name]
    x = torch.randint(0, 20, (batch, shape)) if isinstance(shape, int) else torch.randn(batch, *shape)
    return build().eval(), x, maps


MATH = partial(sdpa_kernel, SDPBackend.MATH)  # PyTorch's counter does not know the fused one of CPUs


def flops(net, x):
    net(x)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), MATH(), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_everything_but_tables_takes_part(name):
    net, x, maps = make(name)
    plan = make_plan(net, "svd", FixedRank(2), ALL, record(net, x, training=True))
    found = [c.name for c in plan.compressions]
    if maps is not None:
        assert found == maps
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1 and "original" not in name)
    taken = sum(c.layer.num_weights for c in plan.compressions)
    if name == "experts":
        assert plan.dense == {"position": "a parameter of Mixed that is not only multiplied by"}
    elif maps is None:
        assert taken == weights


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read(name):
    net, _, _ = make(name)
    net = net.double()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    for each in find_maps(net).values():
        if each.obstacle() is not None:
            continue
        others = {n: other.read().clone() for n, other in find_maps(net).items()}
        weight = each.read() + 0.1 * torch.randn_like(each.read())
        weight = weight if name in EXACT else each.read().clone()
        each.write_(weight)
        assert torch.allclose(each.read(), weight, rtol=1e-6)
        for other, value in others.items():
            same = find_maps(net)[other].parameters[0] is each.parameters[0] and find_maps(net)[other].key == each.key
            if other != each.name and not same:
                assert torch.equal(find_maps(net)[other].read(), value), other
    assert net.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_parameters(name):
    """As autograd finds them through the whole reading."""
    net, _, _ = make(name)
    for each in find_maps(net).values():
        if each.obstacle() is not None:
            continue
        gradient = torch.randn(each.layer.stored_shape)
        net.zero_grad()
        (each.adapter.read(each.module, each.key) * gradient).sum().backward()
        expected = [p.grad.clone() for p in each.parameters]
        net.zero_grad()
        each.add_gradient_(gradient)
        each.add_gradient_(gradient)
        for p, g in zip(each.parameters, expected, strict=True):
            assert torch.allclose(p.grad, 2 * g, atol=1e-6)


@pytest.mark.parametrize("method", ["svd", TiledSVD(4), TiledSVD(4, "factors"), BlockSVD(2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_extracted_computes_what_projected_does(name, method, tmp_path):
    net, x, _ = make(name)
    net = net.double()
    x = x.double() if x.is_floating_point() else x
    small = compress(net, method, FixedRank(1), ALL, example_input=x)
    entries = small.lowrank_pl_record["layers"]
    assert entries
    with torch.no_grad():
        # the reference is written by hand: weights in their places, by the adapters that other tests look at
        projected = copy.deepcopy(net)
        plan = make_plan(net, method, FixedRank(1), ALL, record(net, x, training=True))
        structures = plan.factor(plan.choose_ranks())
        for key, each in find_maps(projected).items():
            if key in structures:
                each.write_(structures[key].reconstruct())
        assert torch.allclose(small(x), projected(x), atol=1e-9)
        assert not torch.allclose(small(x), net(x), atol=1e-3)
    save_compressed(small, tmp_path)
    assert torch.allclose(load_compressed(net, tmp_path)(x), small(x), atol=1e-12)
    sum(y.square().sum() for y in [small.train()(x)]).backward()  # it can be trained on
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
@pytest.mark.parametrize("name", CASES)
def test_multiply_adds_are_those_of_pytorch(name, batch):
    net, x, _ = make(name, batch)
    targets = Targets(skip_first=False, skip_last=False)
    small = compress(net, "svd", FixedRank(2), targets, example_input=x)
    report = summarize(net, small, x, latency=False)
    assert report.dense.macs == flops(net, x[:1]) / 2
    assert report.compressed.macs == flops(small, x[:1]) / 2
    saved = sum((layer.dense.macs or 0) - (layer.compressed.macs or 0) for layer in report.layers)
    parts = 5 * 2 * 8 if name == "experts" else 0  # one factor of `heads` is used for each of two parts
    assert saved - parts == report.dense.macs - report.compressed.macs
    budget = CostBudget("macs", 0.9)
    plan = make_plan(net, "svd", budget, targets, record(net, x, training=True))
    one = make(name, 4)[1]
    same = make_plan(net, "svd", budget, targets, record(net, one, training=True))
    assert plan.choose_ranks() == same.choose_ranks()


class Fit(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen = self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["svd", TiledSVD(4)])
def test_fits_end_with_a_saved_network(name, method, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.report.BATCHES", ())
    _, x, _ = make(name, 8)
    data = DataLoader(TensorDataset(x), batch_size=4)
    for i, callback in enumerate(
        [
            DeepTwist(2, method, FixedRank(2), ALL),
            LearningCompression(budget=CostBudget("params", 0.6), method=method, targets=ALL, l_step_epochs=1, steps=3),
        ]
    ):
        module, extract = Fit(make(name)[0].train()), ExtractStructure(tmp_path / str(i), submodule="net")
        trainer = quiet_trainer(tmp_path, callback, extract, max_epochs=3)
        trainer.fit(module, data, data)
        loaded = load_compressed(CASES[name][0](), tmp_path / str(i)).eval()
        with torch.no_grad():
            expected = module.net.eval()(x)
            assert torch.allclose(loaded(x), expected, atol=1e-5)
        trainer.validate(module, data, verbose=False)  # what is deployed is what was validated
        assert torch.allclose(module.seen, expected[4:], atol=1e-5)
        assert loaded.state_dict().keys() == extract.extracted.state_dict().keys()


def test_a_projection_that_has_no_parameters_is_held_in_evaluation():
    """Rows of a standardized weight have mean 0; those of its tiles do not. Compared with PyTorch's own convolution."""
    torch.manual_seed(0)
    layer, x = Standardized(6, 8, 3, padding=1), torch.randn(2, 6, 7, 7)
    each = find_maps(nn.Sequential(layer))["0"]
    weight = TiledSVD(4).factor(each.read(), each.layer, (1,)).reconstruct()
    each.write_(weight)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(each.read(), weight)
        assert torch.allclose(layer(x), F.conv2d(x, weight, layer.bias, padding=1), atol=1e-5)
        standardized = Standardized.forward(layer, x)
        assert not torch.allclose(layer(x), standardized, atol=1e-3)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(layer.train()(x), standardized)  # training goes on with what its parameters say
    layer.eval()  # with gradients, too: by the parameters that make the weight
    layer(x).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    (2 * layer(x).detach() * Standardized.forward(layer, x)).sum().backward()
    assert torch.allclose(layer(x), F.conv2d(x, weight, layer.bias, padding=1), atol=1e-5)
    assert torch.allclose(found, layer.weight.grad, atol=1e-3)
    assert found.any()
    with torch.no_grad():
        layer.weight.add_(0.01)  # somebody writes
        assert torch.equal(layer(x), Standardized.forward(layer, x))


@pytest.mark.parametrize("name", CASES)
def test_what_is_deployed_goes_elsewhere(name):
    net, x, _ = make(name)
    small = compress(net, "svd", FixedRank(1), ALL, example_input=x).eval()
    expected = small(x)
    for there in (
        torch.export.export(small, (x,)).module(),
        torch.jit.trace(small, (x,)),
        torch.compile(small, backend="eager"),
        pickle.loads(pickle.dumps(small)),
        copy.deepcopy(small),
        copy.deepcopy(small).double().float(),
    ):
        assert torch.allclose(there(x), expected, atol=1e-5)
    half = x.bfloat16() if x.is_floating_point() else x
    assert torch.allclose(small.bfloat16()(half).float(), expected, atol=0.2)


@pytest.mark.parametrize("name", ["weight_norm", "old_weight_norm", "experts", "attention", "lstm", "standardized"])
def test_rank_0(name):
    """Weights of zeros: nothing is divided by their norm."""
    net, x, _ = make(name)
    for each in find_maps(net).values():
        if each.obstacle() is None:
            each.write_(torch.zeros(each.layer.stored_shape))
            assert torch.equal(each.read(), torch.zeros_like(each.read()))
    assert net(x).isfinite().all()
    net.train()(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters() if name != "standardized")
    net, x, _ = make(name)
    plan = make_plan(net, "svd", FixedRank(1), ALL, record(net, x))
    small = extract(net, plan, plan.factor(dict.fromkeys((c.name for c in plan.compressions), ZERO)), {})
    assert small(x).isfinite().all()


@pytest.mark.parametrize("name", ["standardized", "spectral_norm", "weight_norm", "equalized"])
def test_what_stays_dense_is_saved_as_it_is_used(name, tmp_path):
    """A C step moves weights that stay dense, too, to what parameters may not make: it is folded then."""
    net, x, _ = make(name)
    plan = make_plan(net, "svd", FixedRank(1), ALL, record(net, x))
    structures = plan.factor(dict.fromkeys((c.name for c in plan.compressions), DENSE))
    first, second = structures
    structures[first] = structures[first].with_tensors([w + torch.randn_like(w) for w in structures[first].tensors])
    structures[second] = plan.factor(plan.choose_ranks())[second]
    write_weights_(plan, structures)
    small = extract(net, plan, structures, {}, in_memory=True)
    save_compressed(small, tmp_path)
    assert torch.allclose(load_compressed(CASES[name][0](), tmp_path).eval()(x), net(x), atol=1e-5)


def test_what_takes_the_place():
    net, x, _ = make("encoder")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    assert isinstance(small[0].layers[0].self_attn, SplitAttention)
    net, x, _ = make("lstm")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    assert isinstance(small.rnn, SplitRecurrent)
    net, x, _ = make("experts")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    assert isinstance(small.up, FactoredParameter)
    assert isinstance(small.position, nn.Parameter)
    net, x, _ = make("tied_bias")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    assert small.table.factors[0].weight is small.head[0].weight
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_a_factored_parameter_is_a_tensor_to_code():
    torch.manual_seed(0)
    net, x, _ = make("experts")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    up = small.up
    whole = up.tensor().make()
    assert (up.shape, up.dtype, up.ndim, len(up), up.size(1)) == ((4, 12, 8), torch.float32, 3, 4, 12)
    y = torch.randn(4, 3, 8)
    for product in (lambda w: y @ w.mT, lambda w: torch.bmm(y, w.transpose(1, 2)), lambda w: (w @ y.mT).mT,
                    lambda w: torch.stack([F.linear(y[i], w[i]) for i in range(4)]),
                    lambda w: torch.stack([y[i] @ part.T for i, part in enumerate(w.unbind())]),
                    lambda w: y[:2] @ w[torch.tensor([0, 1])].mT, lambda w: y[:2] @ w[:2].mT,
                lambda w: torch.einsum("bts,eos->bteo", y, w), lambda w: torch.einsum("eos,ets->eto", w, y),
                lambda w: torch.einsum("eto,eos->ts", y.new_ones(4, 3, 12), w),
                lambda w: torch.einsum("s,eos->oe", y[0, 0], w)):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            found = product(up)
        with FlopCounterMode(display=False) as dense:
            expected = product(whole)
        assert torch.allclose(found, expected, atol=1e-5)
        assert counter.get_total_flops() < 0.6 * dense.get_total_flops()
    for use in (lambda w: w + 1, lambda w: 2 * w, lambda w: w.sum(), lambda w: w[0, 0], lambda w: w.to(torch.float64),
                lambda w: torch.einsum("eoi->oi", w), lambda w: -w, lambda w: w.flatten(), lambda w: w.double().sum(),
                lambda w: w[..., 0], lambda w: w.reshape(8, -1).mean(0)):  # fmt: skip
        assert torch.allclose(use(up), use(whole))
    assert small.double().up.dtype == torch.float64
    up.sum().backward()
    assert up.factors[0].weight.grad is not None


# -- what only an author knows -------------------------------------------------------------------------------------


class Relative(nn.Module):
    """As XLNet's attention: `[model, heads, head size]`, used in einsum."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Parameter(torch.randn(8, 2, 6)), nn.Parameter(torch.randn(8, 2, 6))

    def forward(self, x):
        return torch.einsum("btnd,hnd->bth", torch.tanh(torch.einsum("bth,hnd->btnd", x, self.q)), self.o)


class Spectral(nn.Module):
    """As in a Fourier neural operator: `[in, out, modes]`, complex."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6, 5, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :5], self.weight))


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", list(registry._adapters))
    monkeypatch.setattr(registry, "_added", [])


@pytest.mark.parametrize(
    ("build", "rows", "shape"), [(Relative, {"q": 1, "o": 1}, (5, 8)), (Spectral, {"weight": 1}, (8, 12))]
)
def test_reshaped_parameters(build, rows, shape, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_pl.report.BATCHES", ())
    torch.manual_seed(0)
    net, x = build(), torch.randn(4, *shape)
    plan = make_plan(net, "svd", FixedRank(1), ALL, record(net, x))
    assert plan.compressions == []
    assert all(build.__name__ in reason for reason in plan.dense.values())
    registry.register_adapter(ReshapedParameters(build, rows))
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    for key in rows:
        dense, rebuilt = getattr(net, key).detach(), getattr(small, key).tensor().make().detach()
        matrices = [(torch.view_as_real(w) if w.is_complex() else w).reshape(8, -1) for w in (dense, rebuilt)]
        u, s, v = torch.linalg.svd(matrices[0].double(), full_matrices=False)
        assert torch.allclose((u[:, :2] * s[:2]) @ v[:2], matrices[1].double(), atol=1e-5)
    save_compressed(small, tmp_path / "small")
    assert torch.equal(load_compressed(net, tmp_path / "small")(x), small(x))
    extract = ExtractStructure(tmp_path / "fit", submodule="net")
    twist = DeepTwist(2, "svd", FixedRank(2), ALL)
    quiet_trainer(tmp_path, twist, extract, max_steps=2).fit(Fit(net), DataLoader(TensorDataset(x), batch_size=2))
    assert torch.equal(load_compressed(build(), tmp_path / "fit")(x), extract.extracted(x))


def test_a_rank_for_every_expert(adapters, tmp_path, monkeypatch):
    """Experts of rank 1, 2, 3 and 4 are exact at these; all of one parameter alike would need rank 4 each."""
    monkeypatch.setattr("lowrank_pl.report.BATCHES", ())
    torch.manual_seed(0)
    net = MixtureOfExperts()
    ranks = (1, 2, 3, 4)
    with torch.no_grad():
        for i, r in enumerate(ranks):
            net.up[i] = torch.randn(12, r) @ torch.randn(r, 8)
    x = torch.randn(3, 5, 8)
    registry.register_adapter(Experts(MixtureOfExperts))
    rule = {f"up.{i}": FixedRank(r) for i, r in enumerate(ranks)} | {"down*": FixedRank(8)}
    small = compress(net, "svd", rule, ALL, example_input=x)
    assert [part[0].out_features for part in small.up.children()] == [1, 2, 3, 4]
    assert isinstance(small.down, nn.Parameter)  # at full rank nothing is cheaper
    assert torch.allclose(small(x), net(x), atol=1e-4)
    report = summarize(net, small, x, latency=False)
    saved = sum((layer.dense.macs or 0) - (layer.compressed.macs or 0) for layer in report.layers)
    assert saved == report.dense.macs - report.compressed.macs > 0
    save_compressed(small, tmp_path / "small")
    assert torch.allclose(load_compressed(net, tmp_path / "small")(x), small(x), atol=1e-6)
    extract = ExtractStructure(tmp_path / "fit", submodule="net")
    twist = DeepTwist(2, "svd", FixedRank(1), ALL)
    quiet_trainer(tmp_path, twist, extract, max_steps=2).fit(Fit(net), DataLoader(TensorDataset(x), batch_size=3))
    assert torch.equal(load_compressed(MixtureOfExperts(), tmp_path / "fit")(x), extract.extracted(x))
    assert torch.allclose(small.up.tensor().sum(), small.up.tensor().make().sum())  # what needs the whole


@pytest.mark.parametrize(
    ("name", "adapter", "patterns", "first"),
    [
        ("attention", AttentionAdapter(), {"[qkv]_proj": 2}, "attention.q_proj.0"),
        ("attention_kdim", AttentionAdapter(), {"k_proj": 4}, "attention.q_proj"),
        ("lstm", RecurrentAdapter(), {"weight_?h_*": 4}, "rnn.weight_ih_l0.0"),
        ("gru", RecurrentAdapter(), {"weight_hh_*": 3}, "rnn.weight_ih_l0"),
    ],
)
def test_blocks_of_rows(name, adapter, patterns, first, adapters, tmp_path, monkeypatch):
    """A rank for each, as if they were layers of their own."""
    monkeypatch.setattr("lowrank_pl.report.BATCHES", ())
    registry.register_adapter(RowBlocks(adapter, patterns))
    net, x, _ = make(name)
    maps = find_maps(net)
    assert next(iter(maps)) == first
    assert sum(each.layer.num_weights for each in maps.values()) == sum(
        p.numel() for p in net.parameters() if p.dim() > 1
    )
    rule = {each: FixedRank(1 + i % 2) for i, each in enumerate(maps)}
    small = compress(net, "svd", rule, ALL, example_input=x)
    plan = make_plan(net, "svd", rule, ALL, record(net, x))
    for each, structure in plan.factor(plan.choose_ranks()).items():
        maps[each].write_(structure.reconstruct())
        assert torch.equal(maps[each].read(), structure.reconstruct())
    assert torch.allclose(small(x), net(x), atol=1e-5)
    report = summarize(make(name)[0], small, x, latency=False)
    saved = sum((layer.dense.macs or 0) - (layer.compressed.macs or 0) for layer in report.layers)
    assert saved == report.dense.macs - report.compressed.macs > 0
    extract = ExtractStructure(tmp_path, submodule="net")
    twist = DeepTwist(2, "svd", FixedRank(1), ALL)
    quiet_trainer(tmp_path, twist, extract, max_steps=2).fit(Fit(net), DataLoader(TensorDataset(x), batch_size=2))
    assert torch.allclose(load_compressed(CASES[name][0](), tmp_path).eval()(x), net.eval()(x), atol=1e-5)


def test_blocks_that_do_not_divide(adapters):
    with pytest.raises(ValueError, match="'q_proj' of MultiheadAttention has 8 outputs, which 3 does not divide"):
        find_maps_with(RowBlocks(AttentionAdapter(), {"q_proj": 3}), Attention())
    with pytest.raises(ValueError, match="`blocks`"):
        RowBlocks(AttentionAdapter(), {"q_proj": 0})
    with pytest.raises(TypeError, match="`adapter`"):
        RowBlocks(Attention, {})


def find_maps_with(adapter, net):
    registry.register_adapter(adapter)
    return find_maps(net)


def test_an_adapter_that_does_not_write_what_it_reads(adapters, tmp_path):
    class Turned(Adapter):
        def maps(self, module):
            return {"": LayerSpec("linear", 8, 8)} if type(module) is nn.Linear else {}

        def read(self, module, key):
            return module.weight

        def write_(self, module, key, weight):
            module.weight.copy_(weight.T)

        def parameters(self, module, key):
            return (module.weight,)

        def deploy(self, module, parts):
            return parts[""]

    net = nn.Sequential(nn.Linear(8, 8))
    before = net[0].weight.clone()
    registry.register_adapter(Turned())
    with pytest.raises(ValueError, match=r"'0': Turned .*`write_` to undo `read`"):
        make_plan(net, "svd", FixedRank(1), ALL)
    with pytest.raises(ValueError, match=r"'net\.0': Turned"):  # before anything is trained
        quiet_trainer(tmp_path, DeepTwist(2), max_steps=2).fit(Fit(net), DataLoader([]))
    assert torch.equal(net[0].weight, before)
    with pytest.raises(TypeError, match="`adapter`"):
        registry.register_adapter(Turned)
    with pytest.raises(ValueError, match=r"numbers of .*axes"):
        ReshapedParameters(Relative, {"q": 0})
    with pytest.raises(TypeError, match="`kind`"):
        ReshapedParameters("Relative", {"q": 1})
    registry.register_adapter(ReshapedParameters(Relative, {"p": 1}))
    with pytest.raises(ValueError, match="'p'"):
        make_plan(Relative(), "svd", FixedRank(1), ALL)


def test_what_is_looked_at_is_left_alone():
    """Trained orthogonal layers keep a buffer that `right_inverse` writes to; merged LoRA has three matrices."""

    class Merged(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.weight.requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))

        def forward(self, x):
            return F.linear(x, self.weight + self.b @ self.a, self.bias)

    torch.manual_seed(0)
    net, x = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), Merged()), torch.randn(4, 8)
    optimizer = torch.optim.SGD(net[0].parameters(), 0.3)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    before, state = net(x), copy.deepcopy(net.state_dict())
    plan = make_plan(net, "svd", FixedRank(1), ALL, record(net, x))
    assert plan.compressions == []
    assert "keeps something else" in plan.dense["0"]
    assert "from 3 matrices" in plan.dense["1"]
    assert torch.equal(net(x), before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("module", [nn.LSTM, nn.MultiheadAttention])
def test_what_cannot_be_taken_apart_stays_dense(module):
    class Helped(module):
        def helper(self):
            return 1

    class Calls(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x) if isinstance(self.inner, nn.LSTM) else self.inner(x, x, x))[0]

    name = "weight_hh_l0" if module is nn.LSTM else "in_proj_weight"
    for inner in (
        Helped(8, 2),
        weight_norm(module(8, 2), name),
        nn.utils.prune.l1_unstructured(module(8, 2), name, 0.5),
    ):
        net = Calls(inner).eval()
        x = torch.randn(5, 3, 8)
        with pytest.warns(UserWarning, match="No layer was compressed"):
            small = compress(net, "svd", FixedRank(1), ALL, example_input=x)
        assert torch.equal(small(x), net(x))


def test_code_that_reads_the_matrices_of_a_recurrent_network():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8)

        def forward(self, x):
            return self.rnn(x.to(self.rnn.weight_hh_l0.dtype))[0]

    net, x = Asks(), torch.randn(5, 3, 8)
    small = compress(net, "svd", FixedRank(1), ALL, example_input=x)
    assert isinstance(small.rnn, nn.LSTM) or small(x).shape == (5, 3, 8)


def test_parameters_that_code_asks_for():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.ws = nn.ParameterList(torch.randn(8, 8) for _ in range(3))

        def forward(self, x):
            for w in self.ws[1:]:
                assert isinstance(w, nn.Parameter)
                x = F.linear(x, w)
            return x

    net, x = Asks(), torch.randn(4, 8)
    trace = record(net, x)
    assert list(trace.calls) == ["ws.1", "ws.2"]


def test_the_padding_of_an_embedding_stays():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Embedding(12, 8, padding_idx=3), nn.Linear(8, 8)), torch.randint(0, 12, (6, 5))
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    for _ in range(3):
        small(x).square().sum().backward()
        optimizer.step()
    assert torch.allclose(small[0](torch.tensor([3])), torch.zeros(1, 8), atol=1e-6)


def test_memory_that_two_parameters_share():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = nn.Parameter(net[0].weight.data)
    assert obstacles(net).keys() == {"0", "1"}


def test_a_difference_is_seen_in_what_attention_and_others_became():
    net, x, _ = make("lstm")
    small = compress(net, "svd", FixedRank(2), ALL, example_input=x)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(-3)
    assert "differ" in difference(net, small, x)


def test_parametrizations():
    """One with a way back is projected, to what it can make; one without stays dense, as does what writing changes."""

    class Squared(nn.Module):
        def forward(self, w):
            return w**2

    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    parametrize.register_parametrization(net[1], "weight", Squared())
    nn.utils.prune.random_unstructured(net[2], "weight", 0.5)
    with torch.no_grad():
        net[2].weight_mask[0] = 0
    assert obstacles(net).keys() == {"1"}
    assert "right_inverse" in obstacles(net)["1"]
    small = compress(net, SVD(), FixedRank(2), ALL, example_input=torch.randn(3, 6))
    assert isinstance(small[0], nn.Sequential)
