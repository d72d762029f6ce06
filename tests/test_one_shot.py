"""`compress` with data: networks of all kinds, what goes wrong, and what is left unchanged."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images
from torch import nn

from lowrank_pl import (
    Cheapest,
    CostBudget,
    FixedRank,
    GreedyEnergy,
    LowRankPlusSparse,
    RankFraction,
    Samples,
    Targets,
    TensorTrain,
    TiledSVD,
    compress,
    load_compressed,
    save_compressed,
    summarize,
)
from lowrank_pl.extraction import RECORD
from lowrank_pl.methods.batch_norms import reestimate_batch_norms_
from lowrank_pl.samples import as_call

ALL = Targets(skip_first=False, skip_last=False, embeddings=True)
MODES = (None, "outputs", "asymmetric")
each_mode = pytest.mark.parametrize("mode", MODES)


def batches(count=7):
    return list(images(count)[0].split(4))


def fit(net, data, mode="asymmetric", rank=0.4, **arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were given fewer vectors")
        return compress(net, "svd", RankFraction(rank), ALL, data=data, reconstruct=mode, **arguments)


def responses(net):
    return getattr(net, RECORD)["responses"]


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Language(nn.Module):
    """Embeddings with a tied head, attention, GPT-2's linear layers, a recurrent network; what it takes are names."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(30, 16), Conv1D(16, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.rnn, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 30)
        self.head.weight = self.table.weight

    def forward(self, ids, *, mask=None, scale=1.0):
        x = self.encoder(self.inner(self.table(ids)) * scale, src_key_padding_mask=mask)
        return {"logits": self.head(self.rnn(x)[0])}


class Shapes(nn.Module):
    """A convolution that is called on images of several sizes, a tuple of outputs, layers that never run."""

    def __init__(self):
        super().__init__()
        self.conv, self.idle, self.sometimes = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.strange = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, y=None):
        x = self.conv(torch.relu(self.conv(x)))
        small = self.conv(F.avg_pool2d(x, 2))
        return small.mean((2, 3)), self.strange @ x.flatten(2).mean(2).repeat(1, 2).T


def language(count=7):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 9).bool()
    mask[:, 6:] = True
    draw = lambda: torch.randint(0, 30, (4, 9), generator=generator)  # noqa: E731
    return [{"ids": draw(), "mask": mask, "labels": draw()} for _ in range(count)]


NETS = {
    "images": (lambda: Net(norm=True, dropout=0.5), lambda: [(x, torch.zeros(4)) for x in batches()]),
    "channels_last": (
        lambda: Net().to(memory_format=torch.channels_last),
        lambda: [x.to(memory_format=torch.channels_last) for x in batches()],
    ),
    "bfloat16": (lambda: Net().bfloat16(), lambda: [x.bfloat16() for x in batches()]),
    "float64": (lambda: Net().double(), lambda: [x.double() for x in batches()]),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), batches),
    "language": (Language, language),
    "compiled_language": (lambda: torch.compile(Language(), backend="eager"), language),
    "shapes": (Shapes, lambda: [x[..., : 6 + 2 * (i % 2)] for i, x in enumerate(batches())]),
}


def state_of(net):
    """All that must not change: values to the last bit, modes, hooks, gradients, attributes, random numbers."""
    hooks = {
        name: [list(v) for k, v in sorted(vars(m).items()) if k.endswith("hooks")] for name, m in net.named_modules()
    }
    return (
        {
            name: (value.data_ptr(), value.clone().flatten().view(torch.uint8))
            for name, value in net.state_dict().items()
        },
        {name: module.training for name, module in net.named_modules()},
        hooks,
        {name: (p.requires_grad, p.grad is None or p.grad.clone()) for name, p in net.named_parameters()},
        {name: sorted(vars(module)) for name, module in net.named_modules()},
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def check_same(before, after):
    for a, b in zip(before, after, strict=True):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]
        for x, y in pairs:
            for left, right in zip(*([each] if not isinstance(each, tuple) else each for each in (x, y)), strict=True):
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def call(net, batch):
    given = as_call(net, batch)
    with torch.no_grad():
        out = net(*given.args, **given.kwargs)
    return out["logits"][:, :6] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out


@each_mode
@pytest.mark.parametrize("kind", NETS)
def test_networks(kind, mode):
    torch.manual_seed(0)
    make, data = NETS[kind]
    net, data = make(), data()
    net.train()
    before = state_of(net)
    out = fit(net, data, mode)
    check_same(before, state_of(net))
    found = responses(out)
    assert found
    assert all(0 <= each["fitted"] < (1 if mode else 3) and 0 <= each["held_out"] < 10 for each in found.values())
    if "language" in kind:
        names = set(getattr(out, RECORD)["layers"])
        assert names - found.keys() == {"table", "head"}  # the table multiplies nothing
        assert {"inner", "rnn.weight_hh_l0", "encoder.layers.1.self_attn.out_proj"} <= found.keys()
    if kind == "shapes":
        assert found["conv"]["samples"] == 3 * 10 * 24
    best = fit(net, data, mode, rank=0.9)
    net.eval(), out.eval(), best.eval()
    expected = call(net, data[0]).float()
    errors = [float((call(each, data[0]).float() - expected).norm() / expected.norm()) for each in (best, out)]
    assert errors[0] < (0.35 if kind == "bfloat16" else 0.3)
    assert errors[0] <= errors[1] + 0.02


@each_mode
def test_an_error_in_the_middle_leaves_everything_alone(mode):
    net = Net(norm=True, dropout=0.5)
    net.conv1.requires_grad_(False)
    data = batches()
    cases = {
        "batch 3 of the data: NaN or Inf in its inputs": (3, torch.full((4, 3, 8, 8), torch.nan)),
        r"^Batch 2 of the data: the model does not run on it \(RuntimeError": (2, torch.randn(4, 2, 8, 8)),
        r"^Batch 5 of the data: the model does not run on it \(ValueError: Expected batches": (5, {"image": data[0]}),
        r"^The model does not run on the first batch of `data` \(RuntimeError.*give Samples\(loader, forward=": (
            0,
            data[0][:, 1:],
        ),
        "^Expected a batch whose size can be told": (0, torch.tensor(1.0)),
    }
    before = state_of(net)
    for words, (number, batch) in cases.items():
        with pytest.raises(ValueError, match=words):
            fit(net, [*data[:number], batch, *data[number + 1 :]], mode)
        check_same(before, state_of(net))


def test_missing_and_unknown_arguments():
    net = Net()
    with pytest.raises(ValueError, match=r"Expected argument `data`, a loader .* beside reconstruct='outputs'"):
        compress(net, "svd", reconstruct="outputs")
    with pytest.raises(ValueError, match="beside metric='inputs' and recalibrate_bn=True"):
        compress(net, "svd", metric="inputs", recalibrate_bn=True)
    for name in ("reconstruct", "metric"):
        with pytest.raises(ValueError, match=f"`{name}` to be .* but got 'output'"):
            compress(net, "svd", data=batches(), **{name: "output"})


class Choosy(nn.Module):
    """Calls a layer as often as its input says, or on as many vectors."""

    def __init__(self, by_rows):
        super().__init__()
        self.first, self.again, self.by_rows = nn.Linear(6, 6), nn.Linear(6, 6), by_rows

    def forward(self, x):
        x = self.first(x)
        often = int(x.double().sum().mul(1e9).abs().remainder(7)) + 1
        if self.by_rows:
            return self.again(x[:often])
        for _ in range(often):
            x = self.again(x)
        return x


@pytest.mark.parametrize("by_rows", [False, True])
def test_calls_that_cannot_be_paired(by_rows):
    torch.manual_seed(0)
    net, data = Choosy(by_rows), [torch.randn(9, 6) for _ in range(20)]
    before = state_of(net)
    with pytest.raises(RuntimeError, match=r"'again', batch \d+: called .* cannot be paired.*reconstruct='outputs'"):
        compress(net, "svd", FixedRank(2), ALL, data=data, reconstruct="asymmetric")
    check_same(before, state_of(net))


class Random(nn.Module):
    """Draws random numbers in evaluation mode, too, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.5, training=True))


def test_random_networks_draw_the_same_in_both():
    torch.manual_seed(0)
    net, data = Random(), [torch.randn(50, 16) for _ in range(4)]
    net.first.weight.data[6:] = 0  # so that nothing is lost in it
    errors, plain = (responses(fit(net, data, mode, rank=0.4)) for mode in ("asymmetric", "outputs"))
    assert errors["first"]["fitted"] < 1e-3
    assert errors["second"]["fitted"] == pytest.approx(plain["second"]["fitted"], rel=0.01)
    assert net.calls == 0


@pytest.mark.parametrize(("mode", "bias"), itertools.product(MODES, [True, False]))
def test_saved_and_loaded(mode, bias, tmp_path):
    """With biases that layers have got, and the column of the table; `summarize` shows what was held out, if any."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=bias), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10, bias=bias), nn.ReLU(), nn.Linear(10, 10, bias=bias),
    ).eval()  # fmt: skip
    for count in (7, 2):
        data = batches(count)
        out = fit(net, data, mode)
        layers = getattr(out, RECORD)["layers"]
        assert all(("bias" in entry) == (not bias and mode is not None) for entry in layers.values())
        save_compressed(out, tmp_path / str(count))
        loaded = load_compressed(copy.deepcopy(net), tmp_path / str(count))
        assert torch.equal(loaded(data[0]), out(data[0]))
        assert responses(loaded) == responses(out)
        report = summarize(net, loaded, data[0])
        key = "held_out" if count == 7 else "fitted"
        shown = {layer.name: layer.response for layer in report.layers if layer.response is not None}
        assert shown == {name: each[key] for name, each in responses(out).items()}
        assert "response error" in report.to_markdown()


class WithIdle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3)
        self.idle = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_batch_norms_are_estimated_again():
    """As plain averages over the samples; those that never run keep what they have."""
    torch.manual_seed(0)
    net = WithIdle()
    net.idle.running_mean.fill_(5.0)
    data = batches(7)
    out = compress(net, "svd", FixedRank(2), ALL, data=data, recalibrate_bn=True)
    with torch.no_grad():
        y = [out.conv(x) for i, x in enumerate(data) if i != 5]
    expected = torch.stack([each.mean((0, 2, 3)) for each in y]).mean(0)
    torch.testing.assert_close(out.norm.running_mean, expected, rtol=1e-5, atol=1e-6)
    variances = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in y]).mean(0)
    torch.testing.assert_close(out.norm.running_var, variances, rtol=1e-5, atol=1e-6)
    assert out.norm.momentum == 0.3
    assert net.norm.num_batches_tracked == 0
    assert (out.idle.running_mean == 5).all()


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.norm(self.first(x)))))


def rows(count, size=10, width=12):
    torch.manual_seed(1)
    return list(torch.randn(count, width).split(size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nonlinear_behind_batch_norms_of_any_type(dtype):
    net = Normed().to(dtype).eval()
    small = fit(net, [x.to(dtype) for x in rows(140)], "nonlinear")
    assert small(rows(4)[0].to(dtype)).dtype == dtype
    in_float32 = responses(fit(Normed().eval(), rows(140), "nonlinear"))
    for name, each in responses(small).items():
        assert each["held_out"] == pytest.approx(in_float32[name]["held_out"], rel=1e-4 if dtype.itemsize == 8 else 0.3)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(100, 32), nn.Linear(32, 4)

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("places", [None, 5, 11])
def test_embeddings_are_nearest_to_their_weights_and_say_so(places):
    words = [torch.randint(100, (20, 12)) for _ in range(7)]
    samples = Samples(words, places=places, loss=lambda model, ids: model(ids).square().mean())
    small = compress(Words(), "svd", RankFraction(0.3), ALL, data=samples, metric="inputs_and_gradients")
    plain = compress(Words(), "svd", RankFraction(0.3), ALL, example_input=words[0])
    assert torch.equal(small.table(words[0]), plain.table(words[0]))
    assert "not known" in getattr(small, RECORD)["notes"]["table"]
    assert responses(small).keys() == {"head"}


def test_errors_of_the_samples_themselves_are_warned_of():
    with pytest.warns(UserWarning, match="fewer than 6 batches, and none was held back"):
        small = compress(Normed().eval(), "svd", data=rows(40))
    assert all(each["held_out"] is None for each in responses(small).values())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*held back")
        small = compress(Normed().eval(), "svd", data=Samples(rows(40), count=30))
    assert all(each["held_out"] is not None and each["samples"] == 30 for each in responses(small).values())


def test_batch_norms_with_a_batch_of_one():
    """Against moments of the batches; the third, of one, gives no variance."""
    net, batches = Normed().eval(), rows(40)
    reestimate_batch_norms_(net, Samples([*batches[:2], batches[0][:1], *batches[2:]]))
    outputs = [net.first(x) for x in batches]
    torch.testing.assert_close(net.norm.running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
    torch.testing.assert_close(net.norm.running_var, torch.stack([y.var(0) for y in outputs]).mean(0))
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda model, x: model(x), r"a tensor \[10, 3\]"),
        (lambda model, x: model(x).sum().detach(), r"a tensor \[\] without a gradient"),
        (lambda model, x: 1.0, "float"),
        (lambda model, x: x["labels"], "Batch 0 of the data: the model does not run on it"),
    ],
)
def test_losses_that_are_none(loss, got):
    with pytest.raises(ValueError, match=f"(?s)Batch 0 of the data.*{got}|{got}"):
        compress(Normed(), "svd", data=Samples(rows(70), loss=loss), metric="inputs_and_gradients")


@pytest.mark.parametrize("mode", ["nonlinear", None])
def test_in_inference_mode(mode):
    given = {"metric": "inputs_and_gradients"} if mode is None else {}
    samples = Samples(rows(140), loss=lambda model, x: model(x).square().mean())
    expected = fit(Normed().eval(), samples, mode, **given)
    with torch.inference_mode():
        found = fit(Normed().eval(), samples, mode, **given)
    assert torch.equal(found(rows(4)[0]), expected(rows(4)[0]))


def test_mappings_are_keywords():
    net, x = Words(), {"ids": torch.randint(100, (3, 5)), "labels": torch.zeros(3)}
    small = compress(net, "svd", targets=ALL, example_input=x)
    assert summarize(net, small, x).dense.macs == 5 * 32 * 4


@pytest.mark.parametrize(
    "method", [TiledSVD(8), LowRankPlusSparse(), Cheapest("svd", LowRankPlusSparse(), TiledSVD(8))], ids=repr
)
@pytest.mark.parametrize("rule", [CostBudget, GreedyEnergy])
def test_a_budget_of_multiply_adds_is_kept_by_what_could_run_dense(rule, method):
    """As PyTorch counts them, whatever is faster."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 12, 12)
    small = compress(net, method, rule("macs", 0.5), example_input=x)
    report = summarize(net, small, x, latency=False)
    assert report.compressed.macs <= 0.5 * report.dense.macs


def test_a_budget_of_multiply_adds_is_kept_by_tensor_trains():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(144, 144), nn.ReLU(), nn.Linear(144, 100)), torch.randn(4, 144)
    every = Targets(skip_first=False, skip_last=False)
    small = compress(net, TensorTrain(), CostBudget("macs", 0.6), every, example_input=x)
    report = summarize(net, small, x, latency=False)
    assert report.compressed.macs <= 0.6 * report.dense.macs


def test_weights_without_numbers_are_refused():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"`model` with weights, but '0.weight' is on the device 'meta'"):
        compress(copy.deepcopy(net).to("meta"), LowRankPlusSparse())
