"""Deployed networks: the same outputs, norms folded where that is right, and the faster form of each layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DECOMPOSITIONS
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lowrank_pl import CompressionRatio, RankFraction, Targets, compress, deploy, from_scratch, save_compressed
from lowrank_pl.layers import DEPLOYED

ALL = Targets(skip_first=False, skip_last=False)


def with_statistics(net, seed=0):
    """Batch norms as after training: none of their numbers is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return net.eval()


class Norms(nn.Module):
    """Norms in every place; those whose names end in `yes` can be folded."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1_yes = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2_behind_relu = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3_of_two_uses = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv4, self.conv5, self.norm4_of_two_layers = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv6, self.norm6_called_twice_yes = nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8, affine=False)
        self.up, self.norm7_yes = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.conv8, self.norm8_of_the_batch = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)
        self.conv9, self.norm9_parametrized = weight_norm(nn.Conv2d(6, 6, 1)), nn.BatchNorm2d(6)
        self.conv10, self.norm10_once_more_before = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.norm11_yes = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = F.relu(self.norm1_yes(self.conv1(x)))
        x = self.norm2_behind_relu(F.relu(self.conv2(x)))
        y = self.conv3(x)
        x = self.norm3_of_two_uses(y) + y
        x = self.norm4_of_two_layers(self.conv4(x)) + self.norm4_of_two_layers(self.conv5(x))
        for _ in range(2):
            x = F.relu(self.norm6_called_twice_yes(self.conv6(x)))
        x = self.norm7_yes(self.up(x))
        x = self.norm8_of_the_batch(self.conv8(x))
        x = self.norm9_parametrized(self.conv9(x))
        x = self.norm10_once_more_before(self.conv10(x)) * self.conv10(x).shape[1] + self.conv10(x).mean()
        return self.norm11_yes(self.fc(x.mean((2, 3))))


def test_norms_are_folded_where_that_changes_nothing():
    net, x = with_statistics(Norms()), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    found = deploy(net, x, channels_last=False)
    done = found.lowrank_pl_deployment
    assert done["folded"] == sorted(name for name, _ in net.named_modules() if name.endswith("yes"))
    assert done == {"dense": [], "folded": done["folded"], "channels_last": False}
    assert all(isinstance(found.get_submodule(name), nn.Identity) for name in done["folded"])
    with torch.no_grad():
        other = torch.randn(4, 3, 8, 8)
        assert torch.allclose(found(other), net(other), rtol=1e-4, atol=1e-4)
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in found.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_what_the_network_returns_is_left_alone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last, self.end = (
                nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            )  # fmt: skip

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return [y, self.end(self.last(z.relu_()))]

    net, x = with_statistics(Both()), torch.randn(2, 3, 5, 5)
    found = deploy(net, x, channels_last=False)
    assert found.lowrank_pl_deployment["folded"] == ["end"]
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found(x), net(x), strict=True))


def clock(monkeypatch, dense_is_faster):
    """Of the two that are timed, the second is the dense layer, or the network that is channels-last."""
    times = [[2.0], [1.0]] if dense_is_faster else [[1.0], [2.0]]
    monkeypatch.setattr("lowrank_pl.deployment.times_ms", lambda *_, **__: times)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24)
        self.up, self.fc = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.Linear(16, 36)

    def forward(self, x):
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.fc(self.up(x).mean((2, 3)))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("decomposition", [d for d in DECOMPOSITIONS if not d.names_its_layers], ids=repr)
def test_every_structure(decomposition, dense, monkeypatch):
    clock(monkeypatch, dense)
    net, x = with_statistics(Small()), torch.randn(2, 3, 12, 12)
    small = compress(net, decomposition, RankFraction(0.4), ALL, example_input=x)
    compressed = [name for name, module in small.named_modules() if isinstance(module, DEPLOYED)]
    top = [name for name in compressed if name in small.lowrank_pl_record["layers"]]
    found = deploy(small, x)
    done = found.lowrank_pl_deployment
    assert done["channels_last"] == dense
    assert sorted(done["dense"]) == (sorted(top) if dense else [])
    with torch.no_grad():
        other = torch.randn(2, 3, 12, 12)
        expected = small.eval()(other)
        assert torch.allclose(found(other), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    if dense:  # plain layers of PyTorch
        assert not any(isinstance(module, DEPLOYED) for module in found.modules())
        assert done["folded"] == ["norm1", "norm2"]
    with pytest.raises(ValueError, match="carries no record"):
        save_compressed(found, "nowhere")


def test_norms_between_factors_and_behind_them(monkeypatch):
    clock(monkeypatch, False)
    x = torch.randn(2, 3, 12, 12)
    net = from_scratch(Small(), "svd", CompressionRatio(2), ALL, example_input=x, norm_between=True)
    with_statistics(net)
    found = deploy(net, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    with torch.no_grad():
        assert torch.allclose(found(x), net(x), rtol=1e-3, atol=1e-4)


def test_what_is_measured_is_kept():
    """Rank 1 of a large layer is far faster than the layer, full rank far slower."""
    x = torch.randn(64, 1024)
    for fraction, dense in ((0.002, []), (0.9, ["0"])):
        small = compress(
            nn.Sequential(nn.Linear(1024, 1024)), {"0": "svd"}, RankFraction(fraction), ALL, example_input=x
        )  # stays dense where it is no cheaper
        if not small.lowrank_pl_record["layers"]:
            continue
        assert deploy(small, x).lowrank_pl_deployment["dense"] == dense


def test_mappings_and_tuples_of_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, left, right):
            return {"sum": self.fc(left) + self.fc(right)}

    net, x, y = Two(), torch.randn(2, 64), torch.randn(2, 64)
    small = compress(net, "svd", RankFraction(0.1), ALL, example_input=(x, y))
    for given in ((x, y), {"left": x, "right": y}):
        found = deploy(small, given)
        with torch.no_grad():
            assert torch.allclose(found(x, y)["sum"], small(x, y)["sum"], atol=1e-5)


def test_bad_input():
    with pytest.raises(TypeError, match="`model`"):
        deploy("net", torch.randn(2, 3))

    class Chance(nn.Module):
        def forward(self, x):
            return x * torch.rand(1, generator=generator)

    generator = torch.Generator()
    with pytest.raises(RuntimeError, match=r"outputs differ by .* computes something else each time"):
        deploy(Chance(), torch.randn(2, 3))
