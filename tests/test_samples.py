"""Batches from anybody's loader: the same in every pass, and nothing else changed."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from lowrank_pl import Samples, Targets, compress
from lowrank_pl.data import EpochSampler
from lowrank_pl.samples import HELD_OUT, as_call
from lowrank_pl.tracing import Call

X = torch.arange(44.0).view(22, 2)
DATA = TensorDataset(X, torch.arange(22))


class Noisy(torch.utils.data.Dataset):
    """Augments by PyTorch's random numbers."""

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return X[i] + torch.rand(2), i


class Stream(IterableDataset):
    def __iter__(self):
        order = torch.randperm(22)
        return (X[i] for i in order)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


LOADERS = {
    "list": lambda: list(X.split(4)),
    "plain": lambda: DataLoader(DATA, 4),
    "shuffle": lambda: DataLoader(DATA, 4, shuffle=True),
    "generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=generator()),
    "sampler": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=generator())),
    "batch_sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=generator()), 4, drop_last=False)
    ),
    "noisy": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, generator=generator()),
    "stream": lambda: DataLoader(Stream(), 4),
    "epochs": lambda: DataLoader(DATA, sampler=EpochSampler(22, 4), batch_size=None),
}


def inputs(batch):
    return batch[0] if isinstance(batch, (list, tuple)) else batch


@pytest.mark.parametrize("kind", LOADERS)
def test_the_same_batches_in_every_pass(kind):
    """Whatever a network draws in between; random states, the loader's too, are as they were."""
    loader = LOADERS[kind]()
    samples = Samples(loader)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    own = next((g for holder in holders if (g := getattr(holder, "generator", None)) is not None), None)
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    inner = own.get_state() if own is not None else None
    first = [(number, held, inputs(batch).clone()) for number, held, batch in samples.batches()]
    if kind == "noisy":
        noise = {round(float((batch - batch.floor()).sum()), 6) for _, _, batch in first}
        assert len(noise) == 6
    torch.rand(3)
    second = []
    for number, held, batch in samples.batches():
        assert own is None or torch.equal(own.get_state(), inner)
        second.append((number, held, inputs(batch).clone()))
        torch.rand(number + 1)
    torch.set_rng_state(states[0])
    assert len(first) == len(second) == 6
    assert [held for _, held, _ in first] == [i % HELD_OUT == HELD_OUT - 1 for i in range(6)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))
    assert own is None or torch.equal(own.get_state(), inner)
    next(samples.batches())  # a pass that somebody has left
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert own is None or torch.equal(own.get_state(), inner)


def test_a_pass_that_fails_leaves_random_numbers_alone():
    """Also those that are drawn before the error is forgotten, with what it refers to."""
    samples = Samples(DataLoader(DATA, 4, shuffle=True))

    def fail():
        for _ in samples.batches():
            raise KeyError

    try:
        fail()
    except KeyError as error:
        kept = error
    torch.rand(1)
    state = torch.get_rng_state()
    del kept
    assert torch.equal(torch.get_rng_state(), state)


def test_count_is_of_fitted_inputs_in_whole_batches():
    loader = list(torch.arange(100.0).view(50, 2).split(5))
    held = lambda data, count: [held for _, held, _ in Samples(data, count).batches()]  # noqa: E731
    assert held(loader, None) == [False] * 5 + [True] + [False] * 4
    assert held(loader, 1) == held(loader, 5) == [False, True]  # at least one is held back
    assert held(loader, 6) == [False] * 2 + [True]
    assert held(loader, 25) == [False] * 5 + [True]
    assert held(loader, 26) == [False] * 5 + [True, False]
    assert held(loader[:5], 25) == held(loader[:5], None) == [False] * 5  # none is left to be
    detections = [[torch.rand(4, 3, 8, 8), [{"boxes": torch.rand(7, 4)}] * 4]] * 3
    assert held(detections, 5) == [False] * 2 + [True]
    assert held([Call((X[:3],), {}, 2)] * 4, 5) == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (X, TypeError, r"but got a Tensor: give \[batch\]"),
        ({"x": X}, TypeError, r"but got a dict: give \[batch\]"),
        ("path", TypeError, "but got a str"),
        (3, TypeError, "but got a int"),
        (DATA, TypeError, "but got a TensorDataset"),
        (nn.Sequential(nn.Linear(2, 2)), TypeError, "but got a Sequential"),
        (iter([X]), TypeError, "gone through again.* but got an iterator, a list_iterator"),
        ((x for x in [X]), TypeError, "gone through again.* a generator"),
        ([], ValueError, "but it is empty"),
        (DataLoader(DATA, 40, drop_last=True), ValueError, "but it is empty"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals(data, kind, words):
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with pytest.raises(kind, match=f"Expected argument `data` .*{words}"):
        compress(net, "svd", data=data)


def test_refused_numbers():
    for name in ("count", "places"):
        for value in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=f"`{name}` to be an int of at least 1 but got {value!r}"):
                Samples([X], **{name: value})
    for name in ("forward", "loss"):
        with pytest.raises(TypeError, match=f"`{name}` to be a function"):
            Samples([X], **{name: 3})

    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="but it is empty"):
        list(Samples(DataLoader(Empty(), 4)).batches())


class Takes(nn.Module):
    def forward(self, x, *, mask=None):
        return x, mask


class TakesAll(nn.Module):
    def forward(self, **given):
        return given


def test_how_batches_are_given_to_a_network():
    net = Takes()
    assert as_call(net, X) == Call((X,))
    assert as_call(net, (X, 1)).args == as_call(net, [X, 1]).args == (X,)
    assert as_call(net, {"x": 1, "mask": 2, "labels": 3}).kwargs == {"x": 1, "mask": 2}
    assert as_call(net, ({"x": 1, "labels": 3}, 5)).kwargs == {"x": 1}
    assert as_call(TakesAll(), {"labels": 3}).kwargs == {"labels": 3}
    assert as_call(torch.compile(net, backend="eager"), {"x": 1, "labels": 3}).kwargs == {"x": 1}
    call = Call((X,), {"mask": X})
    assert as_call(net, call) is call
    with pytest.raises(ValueError, match=r"what Takes.forward takes \(x, mask\) but they hold images, labels"):
        as_call(net, {"images": 1, "labels": 3})


def test_batches_are_moved_and_keep_their_kind():
    Pair = namedtuple("Pair", "x names")
    device = torch.device("meta")
    moved = Samples.moved({"a": Pair(X, ["b"]), "c": (X, [X, 1.0]), "d": None}, device)
    assert type(moved["a"]) is Pair
    assert moved["a"].x.device == device
    assert moved["a"].names == ["b"]
    assert moved["c"][1][0].device == moved["c"][0].device == device
    assert isinstance(moved["c"], tuple)
    call = Samples.moved(Call((X,), {"mask": X}, 7), device)
    assert call.args[0].device == call.kwargs["mask"].device == device
    assert call.batch == 7


def test_the_network_runs_on_its_own_device():
    net = nn.Linear(2, 2, device="meta")
    assert Samples([X]).run(net, (X, X)).device.type == "meta"
    assert Samples([X], forward=lambda model, batch: model(batch[1])).run(net, (None, X)).device.type == "meta"


def test_forward_says_how_and_targets_are_traced():
    """What it gives to the network serves as `example_input`: the last layer is known to be the last."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, a, b):
            return self.head(torch.relu(self.body(a + b)))

    batches = [{"first": torch.randn(30, 8), "second": torch.randn(30, 8)}] * 2
    samples = Samples(batches, forward=lambda model, batch: model(batch["first"], b=batch["second"]))
    out = compress(Net(), "svd", data=samples, targets=Targets(skip_first=False), reconstruct="outputs")
    assert set(out.lowrank_pl_record["layers"]) == {"body"}
    assert "never called" in out.lowrank_pl_record["notes"]["idle"]
    net = Net()
    parts = Samples(batches, forward=lambda model, batch: model.head(model.body(batch["first"])))
    assert set(compress(net, "svd", data=parts).lowrank_pl_record["responses"]) == {"head", "body"}
    with pytest.raises(ValueError, match="Expected argument `forward` to run the network that it is given"):
        compress(net, "svd", data=Samples(batches, forward=lambda model, batch: net(batch["first"], batch["second"])))
