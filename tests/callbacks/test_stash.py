"""Training weights set aside while a module holds others."""

import pytest
import torch
from nets import Net, distance, weights
from torch import nn

from lowrank_pl.callbacks.stash import Stash


def parts(net):
    return [net.conv2.weight, net.fc1.weight]


def scale(net):
    with torch.no_grad():
        for weight in parts(net):
            weight.mul_(2)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_restored_bit_for_bit(detach, inference):
    net = Net()
    before = weights(net)
    with torch.inference_mode(inference):
        stash = Stash([w.detach() if detach else w for w in parts(net)])
        scale(net)
        stash.seal()
        stash.restore_()
    assert distance(before, weights(net)) == 0
    assert not net.conv2.weight.is_inference()
    net.conv2.weight.sum().backward()


@pytest.mark.parametrize("detach", [False, True])
def test_saved_values_take_the_place_of_the_ones_in_a_state_dict(detach):
    """Also for aliases of the parameters, which is what a plan hands out."""
    net = Net()
    before = weights(net)
    stash = Stash([w.detach() if detach else w for w in parts(net)])
    scale(net)
    state = net.state_dict()
    stash.substitute(net, state)
    assert distance(before, state) == 0
    assert list(state) == list(net.state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in state.values())


def test_names_that_a_state_dict_lacks_are_not_added():
    net = Net()
    stash, state = Stash(parts(net)), {"fc1.weight": torch.zeros(16, 48)}
    stash.substitute(net, state)
    assert list(state) == ["fc1.weight"]


def test_tied_names_are_substituted_all():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    stash, before = Stash([net["a"].weight]), net["a"].weight.detach().clone()
    with torch.no_grad():
        net["a"].weight.zero_()
    state = net.state_dict()
    stash.substitute(net, state)
    assert torch.equal(state["a.weight"], before)
    assert torch.equal(state["b.weight"], before)


WRITES = {
    "in place": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(w + 1),
    "data": lambda w: w.data.mul_(2),
    "load_state_dict": None,
    "fused optimizer": None,
    "foreach optimizer": None,
}


@pytest.mark.parametrize("write", list(WRITES))
def test_intact_until_somebody_writes(write):
    net = Net()
    stash = Stash(parts(net))
    scale(net)
    stash.seal()
    assert stash.is_intact()
    if WRITES[write] is not None:
        with torch.no_grad():
            WRITES[write](net.conv2.weight)
    elif write == "load_state_dict":
        net.load_state_dict(Net().state_dict())
    else:
        net.conv2.weight.grad = torch.ones_like(net.conv2.weight)
        torch.optim.SGD([net.conv2.weight], lr=0.1, **{write.split()[0]: True}).step()
    assert not stash.is_intact()
