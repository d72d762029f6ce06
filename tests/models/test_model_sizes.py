"""Every network against the sizes of the papers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.models import NIN, VGG, CifarResNet, LeNet5, LeNet300

# network, its arguments, image shape, weights without biases and norms, MACs for one image
NETWORKS = [
    (LeNet300, {}, (1, 28, 28), 266_200, 266_200),
    (LeNet5, {}, (1, 28, 28), 430_500, 2_293_000),
    (CifarResNet, {"depth": 20}, (3, 32, 32), 268_336, 40_551_040),
    (CifarResNet, {"depth": 32}, (3, 32, 32), 461_872, 68_862_592),
    (CifarResNet, {"depth": 44}, (3, 32, 32), 655_408, 97_174_144),
    (CifarResNet, {"depth": 56}, (3, 32, 32), 848_944, 125_485_696),
    (CifarResNet, {"depth": 110}, (3, 32, 32), 1_719_856, 252_887_680),
    (VGG, {"depth": 16}, (3, 32, 32), 15_239_872, 313_725_952),
    (VGG, {"depth": 19}, (3, 32, 32), 20_548_288, 398_660_608),
    (NIN, {}, (3, 32, 32), 965_568, 222_486_528),
]
IDS = [f"{network.__name__}{arguments.get('depth', '')}" for network, arguments, *_ in NETWORKS]


@pytest.mark.parametrize(("network", "arguments", "shape", "weights", "macs"), NETWORKS, ids=IDS)
def test_sizes(network, arguments, shape, weights, macs):
    net = network(**arguments).eval()
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(layer.weight.numel() for layer in layers) == weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = net(torch.zeros(1, *shape))
    assert counter.get_total_flops() // 2 == macs
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("network", [LeNet300, LeNet5, CifarResNet, VGG, NIN])
def test_follows_the_data(network):
    net = network(input_shape=(2, 41, 38), num_classes=7)
    net(torch.rand(2, 2, 41, 38)).sum().backward()
    assert net(torch.rand(3, 2, 41, 38)).shape == (3, 7)
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(("network", "size"), [(LeNet5, 16), (VGG, 32)])
def test_smallest_images(network, size):
    assert network(input_shape=(3, size, size)).eval()(torch.rand(1, 3, size, size)).shape == (1, 10)
    with pytest.raises(ValueError, match=rf"{size} x {size} or more, got {size - 1} x {size}.*data.size"):
        network(input_shape=(3, size - 1, size))


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_depth(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2.*got {depth}"):
        CifarResNet(depth=depth)


def test_vgg_depth():
    with pytest.raises(ValueError, match=r"\[16, 19\], got 17"):
        VGG(depth=17)
