"""What follows a layer, as it is heard, against the modules that were put there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_pl.tracing import what_follows


class Net(nn.Module):
    """Its two layers, and `then` behind each; gives both outputs added up."""

    def __init__(self, then, shared: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.b = self.a if shared else nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.then = then
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.a(x)) + self.b(x)


def heard(net: nn.Module) -> dict:
    torch.manual_seed(0)
    net.eval()
    with torch.no_grad():
        return what_follows(net, ["a", "b"], lambda: net(torch.randn(3, 5)))


THEN = {
    "relu": lambda net, y: F.relu(y),
    "in place": lambda net, y: y.relu_(),
    "in place, by a module": lambda net, y: nn.ReLU(inplace=True)(y),
    "norm": lambda net, y: net.norm(y),
    "norm and relu": lambda net, y: torch.relu(net.norm(y)),
    "relu and norm": lambda net, y: net.norm(nn.ReLU6()(y)),
    "gelu": lambda net, y: nn.GELU(approximate="tanh")(net.norm(y)),
    "leaky": lambda net, y: F.leaky_relu(y, 0.3, True),
    "silu": lambda net, y: F.silu(y, inplace=True),
    "hard swish": lambda net, y: nn.Hardswish()(net.norm(y)),
    "sigmoid": lambda net, y: y.sigmoid(),
    "then more": lambda net, y: F.relu(y).flatten(1).clone() @ torch.eye(4),
}


@pytest.mark.parametrize("name", THEN)
def test_what_follows(name):
    net = Net(THEN[name])
    found = heard(net)
    y = torch.randn(6, 4)
    kept = y.clone()
    assert found.keys() == {"a"}  # b is added to something else first
    assert torch.equal(found["a"](y), THEN[name](net, y.clone()))
    assert torch.equal(y, kept)


NOTHING = {
    "added first": lambda net, y: F.relu(y + 1),
    "added in place": lambda net, y: F.relu(y.add_(1)),
    "twice": lambda net, y: y * torch.sigmoid(y),
    "two activations": lambda net, y: F.relu(y) + torch.tanh(y),
    "nothing": lambda net, y: y,
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_that_could_be_told(name):
    assert not heard(Net(NOTHING[name]))


def test_a_layer_that_runs_twice():
    assert not heard(Net(THEN["relu"], shared=True))


def test_batch_norm_in_training_is_no_function_of_rows():
    net = Net(THEN["norm"])
    net.eval()
    net.norm.train()
    with torch.no_grad():
        assert not what_follows(net, ["a"], lambda: net(torch.randn(3, 5)))
