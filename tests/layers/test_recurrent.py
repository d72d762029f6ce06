"""Against PyTorch's own recurrent networks with the same weights."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from lowrank_pl.layers import GroupedLinear, SplitRecurrent, recurrent_inputs

N, L, IN, HIDDEN = 3, 5, 4, 6
KINDS = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 2}),
    "GRU": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
LENGTHS = {"sorted": [5, 3, 3], "unsorted": [1, 5, 4], "equal": [5, 5, 5]}
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.jit..*is deprecated"),
]


def pair(kind, dtype=torch.float64, **settings):
    layer, more = KINDS[kind]
    rnn = layer(IN, HIDDEN, **more, **settings).to(dtype)
    return rnn, SplitRecurrent.of(rnn, {})


def initial(rnn, *batch):
    """A state to begin with."""
    several = rnn.num_layers * (1 + rnn.bidirectional)
    sizes = [rnn.proj_size or HIDDEN, *([HIDDEN] if rnn.mode == "LSTM" else [])]
    states = [torch.randn(several, *batch, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    return tuple(states) if rnn.mode == "LSTM" else states[0]


def flat(outputs):
    """The tensors among the outputs, in order; of packed sequences the batch sizes and the two orders, too."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [] if outputs is None else [tensor for each in outputs for tensor in flat(each)]


def own_name(name):
    """Of a parameter of a split network, in PyTorch's own: `weight_ih_l0.bias` is `bias_ih_l0`."""
    matrix, _, kind = name.partition(".")
    return matrix.replace("weight", kind)


def close(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def same(rnn, split, x, hx=None):
    """Forward and backward."""
    found = []
    for module in (rnn, split):
        outputs = module(x, hx)
        loss = sum(tensor.sin().sum() for tensor in flat(outputs) if tensor.is_floating_point())
        data = x.data if isinstance(x, PackedSequence) else x
        names, parameters = zip(*module.named_parameters(), strict=True)
        wrt = [data, *flat(hx)]
        gradients = torch.autograd.grad(loss, [*wrt, *parameters])
        named = dict(zip(map(own_name, names) if module is split else names, gradients[len(wrt) :], strict=True))
        found.append(([*flat(outputs), *gradients[: len(wrt)]], named, outputs))
    (expected, references, outputs), (actual, gradients, own) = found
    close(actual, expected)
    assert gradients.keys() == references.keys()
    close([gradients[name] for name in references], list(references.values()))
    assert [type(each) for each in own] == [type(each) for each in outputs]


def all_settings(test):
    for mark in (
        pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"]),
        pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"]),
        pytest.mark.parametrize("bidirectional", [True, False], ids=["both", "one"]),
        pytest.mark.parametrize("num_layers", [1, 3]),
        each_kind,
    ):
        test = mark(test)
    return test


@pytest.mark.parametrize("batch_first", [True, False], ids=["N L", "L N"])
@all_settings
def test_same_as_pytorch(kind, batch_first, num_layers, bidirectional, bias, given):
    rnn, split = pair(kind, batch_first=batch_first, num_layers=num_layers, bidirectional=bidirectional, bias=bias)
    x = torch.randn((N, L, IN) if batch_first else (L, N, IN), dtype=torch.float64, requires_grad=True)
    same(rnn, split, x, initial(rnn, N) if given else None)
    one = torch.randn(L, IN, dtype=torch.float64, requires_grad=True)
    same(rnn, split, one, initial(rnn) if given else None)


@pytest.mark.parametrize("lengths", LENGTHS)
@all_settings
def test_packed_sequences(kind, num_layers, bidirectional, bias, given, lengths):
    """Which `batch_first` says nothing about."""
    rnn, split = pair(kind, batch_first=True, num_layers=num_layers, bidirectional=bidirectional, bias=bias)
    sequences = [torch.randn(n, IN, dtype=torch.float64, requires_grad=True) for n in LENGTHS[lengths]]
    x = pack_sequence(sequences, enforce_sorted=lengths != "unsorted")
    same(rnn, split, x, initial(rnn, N) if given else None)


@each_kind
def test_packed_sequences_in_their_own_order(kind):
    """Each as if it came alone."""
    _, split = pair(kind, num_layers=2, bidirectional=True)
    sequences = [torch.randn(n, IN, dtype=torch.float64) for n in LENGTHS["unsorted"]]
    outputs, last = split(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = pad_packed_sequence(outputs, batch_first=True)
    for i, sequence in enumerate(sequences):
        alone, ended = split(sequence)
        close([padded[i, : len(sequence)], *(each[:, i] for each in flat([last]))], [alone, *flat([ended])])


@each_kind
def test_dropout_between_layers(kind):
    """The same numbers are drawn, in training only."""
    rnn, split = pair(kind, num_layers=3, bidirectional=True, dropout=0.4)
    x = torch.randn(L, N, IN, dtype=torch.float64)
    packed = pack_padded_sequence(x, [5, 4, 2])
    for each in (x, packed):
        outputs = []
        for training in (True, False):
            for module in (rnn, split):
                torch.manual_seed(0)
                outputs.append(flat(module.train(training)(each)))
        close(outputs[1], outputs[0])
        close(outputs[3], outputs[2])
        assert not torch.equal(outputs[0][0], outputs[2][0])


@pytest.mark.parametrize("batch_first", [True, False])
@each_kind
def test_autocast(kind, batch_first):
    rnn, split = pair(kind, torch.float32, num_layers=2, batch_first=batch_first)
    x = torch.randn(N, L, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = split(x)
    for a, b in zip(flat(y), flat(rnn(x)), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, atol=0.03, rtol=0.03)
    y[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in split.parameters())


@each_kind
def test_attributes(kind):
    rnn, split = pair(kind, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
    names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    for name in (*names, "proj_size", "training"):
        assert getattr(split, name) == getattr(rnn, name)
    split.flatten_parameters()
    assert {own_name(name): p.shape for name, p in split.named_parameters()} == {
        name: p.shape for name, p in rnn.named_parameters()
    }
    assert "batch_first=True" in repr(split)


def test_copies_not_views():
    rnn = nn.GRU(IN, HIDDEN).eval()
    rnn.weight_ih_l0.requires_grad_(False)
    split = SplitRecurrent.of(rnn, {})
    assert not split.training
    assert [name for name, p in split.named_parameters() if not p.requires_grad] == ["weight_ih_l0.weight"]
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
    assert all(p.count_nonzero() for p in split.parameters())


@each_kind
def test_on_the_meta_device(kind):
    with torch.device("meta"):
        rnn, split = pair(kind, num_layers=2, bidirectional=True)
        assert all(p.is_meta for p in split.parameters())
        y, _ = split(torch.randn(L, N, IN, dtype=torch.float64))
        assert y.shape == (L, N, 2 * (rnn.proj_size or HIDDEN))
        assert all(x.is_meta for x in recurrent_inputs(rnn, (torch.randn(L, N, IN),), {}).values())
    split.to_empty(device="cpu").load_state_dict(pair(kind, num_layers=2, bidirectional=True)[1].state_dict())


def test_given_matrices():
    """One in two factors and one in groups, beside a network that has their products."""
    rnn = nn.LSTM(IN, HIDDEN).double()
    first, second, grouped = (
        nn.Linear(HIDDEN, 2, bias=False),
        nn.Linear(2, 4 * HIDDEN),
        GroupedLinear(IN, 4 * HIDDEN, 2),
    )
    split = SplitRecurrent.of(
        rnn, {"weight_hh_l0": nn.Sequential(first, second).double(), "weight_ih_l0": grouped.double()}
    )
    assert split.weight_ih_l0 is grouped
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(second.weight @ first.weight)
        rnn.bias_hh_l0.copy_(second.bias)
        rnn.weight_ih_l0.copy_(torch.block_diag(*grouped.weight.chunk(2)))
        rnn.bias_ih_l0.copy_(grouped.bias)
    for x in (torch.randn(L, N, IN).double(), torch.randn(L, IN).double()):
        close(flat(split(x)), flat(rnn(x)))
    with pytest.raises(ValueError, match=r"\['weight_hh_l0', 'weight_ih_l0'\] but got \['weight_ih_l1'\]"):
        SplitRecurrent.of(rnn, {"weight_ih_l1": grouped})


@each_kind
def test_wrong_states_are_refused(kind):
    _, split = pair(kind)
    other, _ = pair(kind, num_layers=2)
    x = torch.randn(L, N, IN, dtype=torch.float64)
    for hx in (initial(split, 1), initial(other, N), initial(split)):
        with pytest.raises(ValueError, match="Expected `hx` of shape"):
            split(x, hx)


@each_kind
def test_exported_compiled_copied(kind):
    """For sequences of one length and any number of them."""
    _, split = pair(kind, bidirectional=True, batch_first=True)
    split.eval()
    x = torch.randn(N, 3, IN, dtype=torch.float64)
    exported = torch.export.export(split, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.compiler.reset()
    others = [exported, torch.compile(split, backend="eager", fullgraph=True), torch.jit.trace(split, (x,))]
    for other in (*others, copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        for each in (x, torch.cat([x, x])):
            close(flat(other(each)), flat(split(each)))
    state = initial(split, N)
    close(flat(torch.export.export(split, (x, state)).module()(x, state)), flat(split(x, state)))


@pytest.mark.parametrize("bidirectional", [True, False])
@each_kind
def test_inputs_of_the_matrices(kind, bidirectional):
    """As many vectors, and as long ones, as each matrix gets in a call of the split network."""
    rnn, split = pair(kind, num_layers=2, bidirectional=bidirectional)
    batch = torch.randn(L, N, IN, dtype=torch.float64)
    packed = pack_sequence([torch.randn(n, IN, dtype=torch.float64) for n in (5, 2, 1)])
    for x in (batch, batch[:, 0], packed):
        counts = {}

        def count(name, vectors, counts=counts):
            assert counts.setdefault(name, [0, vectors.shape[-1]])[1] == vectors.shape[-1]
            counts[name][0] += vectors[..., 0].numel()

        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
            for name, module in split.named_children()
        ]
        split(x)
        for handle in handles:
            handle.remove()
        data = x.data if isinstance(x, PackedSequence) else x
        for args, kwargs in (((x,), {}), ((x, None), {}), ((), {"input": x})):
            found = recurrent_inputs(rnn, args, kwargs)
            assert {name: [each[..., 0].numel(), each.shape[-1]] for name, each in found.items()} == counts
            assert found["weight_ih_l0"] is data
            for each in found.values():
                assert each.shape[:-1] == data.shape[:-1]
                assert each.dtype == data.dtype
                assert each.isfinite().all()
                vectors = each.flatten(0, -2)
                assert torch.linalg.matrix_rank(vectors) == min(vectors.shape)
