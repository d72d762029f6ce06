"""Two processes (gloo): the first decides, both hold it, and both hear of what goes wrong."""

import pickle

import pytest
import torch
import torch.distributed as dist
from killing import in_two_processes
from torch import nn

from lowrank_pl import CostBudget, make_plan
from lowrank_pl.processes import equalize_, from_first, is_parallel, place

pytestmark = pytest.mark.timeout(120)


class Stubborn(Exception):
    """Comes out of pickling as something else's error."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Locked(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not me")


def unreachable():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    return make_plan(net, "svd", CostBudget("params", 1e-3)).choose_ranks()


def raising(error):
    def make():
        raise error

    return make


def refuse():
    raise AssertionError("the second process was asked")


MAKERS = {
    "budget": unreachable,
    "plain": raising(KeyError("fc1")),
    "stubborn": raising(Stubborn("one", "two")),
    "locked": raising(Locked("what happened")),
}


def caught(make):
    """Kind and words of what is raised."""
    try:
        from_first(make)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def work(folder):
    """What each process does; its results go into a file of its own."""
    dist.init_process_group("gloo")
    number = dist.get_rank()
    seen = {"parallel": is_parallel(), "place": place()}
    seen["value"] = from_first((lambda: {"ranks": [(2,), (3,)], "of": "the first"}) if number == 0 else refuse)
    seen["none"] = from_first((lambda: None) if number == 0 else refuse)
    seen["errors"] = {name: caught(make if number == 0 else refuse) for name, make in MAKERS.items()}
    torch.manual_seed(number)
    parameter = nn.Parameter(torch.randn(3, 4))
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    tensors = [parameter, convolution.weight, torch.randn(5, 6).double().mT, torch.tensor(float(number))]
    places = [tensor.data_ptr() for tensor in tensors]
    with torch.inference_mode(False):
        equalize_(tensor for tensor in tensors)  # an iterable, once
    seen["in place"] = places == [tensor.data_ptr() for tensor in tensors]
    seen["trainable"] = parameter.requires_grad and parameter.is_leaf and parameter.grad is None
    seen["tensors"] = [tensor.detach().clone() for tensor in tensors]
    dist.barrier()
    dist.destroy_process_group()
    seen["after"] = place()
    with open(f"{folder}/seen{number}", "wb") as file:
        pickle.dump(seen, file)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    in_two_processes(work, str(folder))
    return [pickle.loads((folder / f"seen{number}").read_bytes()) for number in (0, 1)]


def test_places(both):
    assert [seen["parallel"] for seen in both] == [True, True]
    assert [seen["place"] for seen in both] == [(0, 2), (1, 2)]
    assert [seen["after"] for seen in both] == [(0, 1), (0, 1)]


def test_both_get_what_the_first_makes(both):
    for seen in both:
        assert seen["value"] == {"ranks": [(2,), (3,)], "of": "the first"}
        assert seen["none"] is None


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("budget", "ValueError", "A budget of 0.001 of the dense cost cannot be reached"),
        ("plain", "KeyError", "'fc1'"),
        ("stubborn", "RuntimeError", "Stubborn: one and two"),
        ("locked", "RuntimeError", "Locked: what happened"),
    ],
)
def test_both_raise_what_the_first_raises(both, name, kind, words):
    one, two = (seen["errors"][name] for seen in both)
    assert one == two
    assert one[0] == kind
    assert words in one[1]


def test_both_hold_the_tensors_of_the_first(both):
    one, two = both
    torch.manual_seed(0)
    assert torch.equal(one["tensors"][0], torch.randn(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one["tensors"], two["tensors"], strict=True))
    for seen in both:
        assert seen["in place"]
        assert seen["trainable"]
        assert float(seen["tensors"][3]) == 0


def test_alone_nothing_is_sent():
    assert place() == (0, 1)
    assert not is_parallel()
    assert from_first(lambda: 3) == 3
    with pytest.raises(Stubborn):
        from_first(MAKERS["stubborn"])
    tensor = torch.ones(2)
    equalize_([tensor])
    assert torch.equal(tensor, torch.ones(2))
