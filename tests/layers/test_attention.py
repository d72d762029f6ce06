"""Against `nn.MultiheadAttention` with the same weights."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.layers import GroupedLinear, LazyWeight, SplitAttention, attention_inputs

N, L, S, E, HEADS = 3, 5, 7, 8, 2
SETTINGS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "kdim, vdim": {"kdim": 6, "vdim": 10, "batch_first": True},
    "kdim, no bias": {"kdim": 6, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:`torch.jit..*is deprecated"),
]


def padding(kind):
    """The last keys of the first two sequences are hidden."""
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[0, -2:] = hidden[1, -1:] = True
    return {None: None, "bool": hidden, "float": torch.randn(N, S).double().masked_fill(hidden, -torch.inf)}[kind]


def mask(kind):
    """Two-dimensional as the causal mask, three-dimensional with numbers of its own for each sequence and head."""
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    own = torch.rand(N * HEADS, L, S) < 0.3
    own[..., 0] = False  # everybody sees something
    masks = {None: None, "bool 2": causal, "bool 3": own, "float 2": torch.randn(L, S), "float 3": own * torch.randn(1)}
    return masks[kind].double() if kind and "float" in kind else masks[kind]


def pair(dtype=torch.float64, **setting):
    attention = nn.MultiheadAttention(E, HEADS, **setting).to(dtype)
    for parameter in attention.parameters():  # biases start at zero
        nn.init.normal_(parameter, std=0.5)
    return attention, SplitAttention.of(attention, {})


def inputs(attention, batched=True, dtype=torch.float64):
    sizes = [(L, attention.embed_dim), (S, attention.kdim), (S, attention.vdim)]
    shapes = [(n, w) if not batched else (N, n, w) if attention.batch_first else (n, N, w) for n, w in sizes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(module, x):
    """By the inputs, and by the parameters in the order query, key, value, output, `bias_k`, `bias_v`."""
    if isinstance(module, nn.MultiheadAttention):
        packed = module.in_proj_weight
        weights = [packed] if packed is not None else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        biases = [] if module.in_proj_bias is None else [module.in_proj_bias]
    else:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections if projection.bias is not None]
    rest = [module.out_proj.weight, module.out_proj.bias, module.bias_k, module.bias_v]
    found = [None if p is None else p.grad for p in (*x, *rest)]
    return [*found, *(torch.cat([p.grad.flatten() for p in group]) for group in (weights, biases) if group)]


def close(actual, expected):
    """Both outputs."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, equal_nan=True)


def same(attention, split, x, **options):
    """Forward and backward."""
    outputs = []
    for module in (split, attention):
        for tensor in (*x, *module.parameters()):
            tensor.grad = None
        y, weights = module(*x, **options)
        loss = y.cos().sum() if weights is None else y.cos().sum() + weights.square().sum()
        loss.backward()
        outputs.append(((y, weights), gradients(module, x)))
    (actual, grads), (expected, references) = outputs
    close(actual, expected)
    close(grads, references)


@each_setting
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("key_padding_mask", [None, "bool", "float"])
@pytest.mark.parametrize("attn_mask", [None, "bool 2", "bool 3", "float 2", "float 3"])
def test_same_as_pytorch(setting, key_padding_mask, attn_mask, need_weights):
    attention, split = pair(**SETTINGS[setting])
    options = {"key_padding_mask": padding(key_padding_mask), "attn_mask": mask(attn_mask)}
    for average in (True, False) if need_weights else (True,):
        options |= {"need_weights": need_weights, "average_attn_weights": average}
        same(attention, split, inputs(attention), **options)
    with torch.no_grad():  # PyTorch's fast path, where it takes it
        x = inputs(attention)
        close(split.eval()(*x, **options), attention.eval()(*x, **options))


@each_setting
@pytest.mark.parametrize("need_weights", [True, False])
def test_single_sequences(setting, need_weights):
    attention, split = pair(**SETTINGS[setting])
    x = inputs(attention, batched=False)
    for key_padding_mask, attn_mask in product((None, "bool", "float"), (None, "bool 2", "float 3")):
        one, several = padding(key_padding_mask), mask(attn_mask)
        one = None if one is None else one[0]
        several = several[:HEADS] if attn_mask == "float 3" else several
        for average in (True, False):
            options = {"need_weights": need_weights, "average_attn_weights": average}
            same(attention, split, x, key_padding_mask=one, attn_mask=several, **options)


@each_setting
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("key_padding_mask", [None, "bool"])
def test_causal(setting, need_weights, key_padding_mask):
    """The hint is all that is looked at where it suffices: a mask that contradicts it shows when."""
    attention, split = pair(**SETTINGS[setting])
    options = {"key_padding_mask": padding(key_padding_mask), "need_weights": need_weights, "is_causal": True}
    for kind in ("bool 2", "float 2"):
        same(attention, split, inputs(attention), attn_mask=mask(kind), **options)
    for module in (attention, split):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(*inputs(attention), is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_nothing_to_be_seen(need_weights):
    attention, split = pair()
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1] = True
    options = {"key_padding_mask": hidden, "need_weights": need_weights}
    x = inputs(attention)
    close(split(*x, **options), attention(*x, **options))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout(need_weights):
    """The same numbers are drawn, in training only."""
    attention, split = pair(dropout=0.4)
    x = inputs(attention)
    outputs = []
    for training, module in product((True, False), (split, attention)):
        torch.manual_seed(0)
        outputs.append(module.train(training)(*x, need_weights=need_weights))
    close(outputs[0], outputs[1])
    close(outputs[2], outputs[3])
    assert not torch.equal(outputs[0][0], outputs[2][0])


@pytest.mark.parametrize("need_weights", [True, False])
@each_setting
def test_autocast(setting, need_weights):
    attention, split = pair(torch.float32, **SETTINGS[setting])
    x = inputs(attention, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        options = {"need_weights": need_weights, "attn_mask": mask("bool 2")}
        (y, weights), (expected, reference) = split(*x, **options), attention(*x, **options)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.05)
    if need_weights:
        torch.testing.assert_close(weights, reference, atol=0.02, rtol=0.05)


@each_setting
def test_attributes(setting):
    attention, split = pair(**SETTINGS[setting])
    sizes = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim")
    for name in (*sizes, "dropout", "batch_first", "add_zero_attn", "training"):
        assert getattr(split, name) == getattr(attention, name)
    for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        expected, actual = getattr(attention, name), getattr(split, name)
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert torch.equal(actual.clone(), expected)
    assert not split._qkv_same_embed_dim  # PyTorch's encoder layer would multiply by the weights itself
    assert split.in_proj_weight is None or isinstance(split.in_proj_weight, LazyWeight)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in attention.parameters())


def test_copies_not_views():
    attention = nn.MultiheadAttention(E, HEADS, add_bias_kv=True).eval()
    attention.in_proj_weight.requires_grad_(False)
    split = SplitAttention.of(attention, {})
    assert not split.training
    assert not split.k_proj.weight.requires_grad
    assert split.k_proj.bias.requires_grad
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
    assert all(p.count_nonzero() for name, p in split.named_parameters() if "bias" not in name)


@each_setting
def test_on_the_meta_device(setting):
    with torch.device("meta"):
        attention, split = pair(**SETTINGS[setting])
        assert all(p.is_meta for p in split.parameters())
        x = inputs(attention)
        assert split(*x)[0].shape == attention(*x)[0].shape
    split.to_empty(device="cpu").load_state_dict(pair(**SETTINGS[setting])[1].state_dict())


def test_given_projections():
    """A linear map in two factors, and one in groups, beside an attention that has their products."""
    attention = nn.MultiheadAttention(E, HEADS, batch_first=True).double()
    first, second, grouped = nn.Linear(E, 2, bias=False), nn.Linear(2, E), GroupedLinear(E, E, 2)
    projections = {"k_proj": nn.Sequential(first, second).double(), "out_proj": grouped.double()}
    split = SplitAttention.of(attention, projections)
    assert split.k_proj is projections["k_proj"]
    assert split.out_proj is projections["out_proj"]
    with torch.no_grad():
        attention.in_proj_weight[E : 2 * E] = second.weight @ first.weight
        attention.in_proj_bias[E : 2 * E] = second.bias
        attention.out_proj.weight.copy_(torch.block_diag(*grouped.weight.chunk(2)))
        attention.out_proj.bias.copy_(grouped.bias)
    x = inputs(attention)
    close(split(*x), attention(*x))
    with pytest.raises(ValueError, match=r"\['k_proj', 'out_proj', 'q_proj', 'v_proj'\] but got \['proj_k'\]"):
        SplitAttention.of(attention, {"proj_k": nn.Linear(E, E)})


def split_all(model, keep=()):
    """A copy whose attentions are split but for those of that number."""
    model = copy.deepcopy(model)
    attentions = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for i, (name, attention) in enumerate(attentions):
        parent, _, own = name.rpartition(".")
        if i not in keep:
            setattr(model.get_submodule(parent), own, SplitAttention.of(attention, {}))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("keep", [(), (0,), (1,)])
@pytest.mark.parametrize("form", ["none", "padding", "causal"])
def test_in_an_encoder(training, grad, batch_first, norm_first, keep, form):
    layer = nn.TransformerEncoderLayer(E, HEADS, 12, dropout=0, batch_first=batch_first, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 3).double().train(training)
    split = split_all(encoder, keep)
    x = torch.randn((N, S, E) if batch_first else (S, N, E), dtype=torch.float64)
    hidden = padding("bool")
    options = {
        "none": {},
        "padding": {"src_key_padding_mask": hidden},
        "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(S).double(), "is_causal": True},
    }[form]
    with torch.set_grad_enabled(grad):
        y, expected = split(x, **options), encoder(x, **options)
    seen = ~hidden if form == "padding" else torch.ones(N, S, dtype=torch.bool)
    if not batch_first:
        seen = seen.T
    torch.testing.assert_close(y[seen], expected[seen])  # the fast path leaves zeros at what is padded


@pytest.mark.parametrize("training", [True, False])
def test_in_a_transformer(training):
    transformer = nn.Transformer(E, HEADS, 2, 2, 12, dropout=0, batch_first=True).double().train(training)
    split = split_all(transformer)
    source, target = (torch.randn(N, n, E, dtype=torch.float64) for n in (S, L))
    hidden = padding("bool")
    options = {
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L).double(),
        "tgt_is_causal": True,
    }
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(split(source, target, **options), transformer(source, target, **options))


def test_in_a_vision_transformer():
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(16, 4, 2, HEADS, E, 12, num_classes=3).double()
    nn.init.normal_(net.heads.head.weight)  # which starts at zero
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(split_all(net).train(training)(x), net.train(training)(x))


@each_setting
@pytest.mark.parametrize("need_weights", [True, False])
def test_counts_as_many_operations(setting, need_weights):
    attention, split = pair(**SETTINGS[setting])
    x = inputs(attention)
    counts = []
    for module in (attention, split):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                module(*x, need_weights=need_weights)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Self(nn.Module):
    """Self-attention that other sequences than the one it was traced with may go through."""

    def __init__(self, split, need_weights):
        super().__init__()
        self.split, self.need_weights = split, need_weights

    def forward(self, x, hidden):
        y, weights = self.split(x, x, x, key_padding_mask=hidden, need_weights=self.need_weights)
        return y if weights is None else (y, weights)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_exported_traced_compiled_copied(need_weights, added):
    _, split = pair(batch_first=True, add_bias_kv=added, add_zero_attn=added)
    module = Self(split, need_weights).eval()
    x, hidden = torch.randn(N, S, E, dtype=torch.float64), padding("bool")
    more, hidden_more = torch.cat([x, x])[:, 1:], torch.cat([hidden, hidden])[:, 1:]
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (x, hidden), dynamic_shapes=(axes, axes)).module()
    stored = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x, hidden)), stored)
    stored.seek(0)
    others = [exported, torch.jit.load(stored), torch.compile(module, backend="eager", fullgraph=True)]
    others += [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for other in others:
        for each in ((x, hidden), (more, hidden_more)):
            torch.testing.assert_close(other(*each), module(*each))


def test_inputs_of_the_projections():
    attention, _ = pair(kdim=6, vdim=10)
    query, key, value = inputs(attention)
    for args, kwargs in [
        ((query, key, value), {}),
        ((query, key), {"value": value, "need_weights": False}),
        ((), {"value": value, "key": key, "query": query}),
        ((query, key, value, None, False), {}),
    ]:
        found = attention_inputs(attention, args, kwargs)
        assert [found[name] is x for name, x in zip(("q_proj", "k_proj", "v_proj"), (query, key, value), strict=True)]
        assert found["out_proj"].shape == (L, N, E)
        assert F.linear(found["out_proj"], attention.out_proj.weight).isfinite().all()
