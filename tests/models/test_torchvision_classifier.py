"""torchvision's networks by name."""

import pytest
import torch
import torchvision

from lowrank_pl.models import torchvision_classifier


def test_builds_the_network():
    net = torchvision_classifier("resnet18", input_shape=(3, 64, 64), num_classes=7)
    assert type(net) is torchvision.models.ResNet
    assert net.fc.out_features == 7


@pytest.mark.parametrize("name", ["googlenet", "vit_b_32"])
def test_one_output_for_the_given_images(name):
    net = torchvision_classifier(name, input_shape=(3, 64, 64), num_classes=5)
    assert net.train()(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no classifier 'resnet19'; known names: .*resnet18"):
        torchvision_classifier("resnet19")
    # a detector is a torchvision model too, but no classifier
    with pytest.raises(ValueError, match="no classifier"):
        torchvision_classifier("fasterrcnn_resnet50_fpn")


def test_gray_images():
    with pytest.raises(ValueError, match=r"3 channels, got the shape \(1, 28, 28\)"):
        torchvision_classifier("resnet18", input_shape=(1, 28, 28))


@pytest.mark.parametrize(("num_classes", "head_is_loaded"), [(1000, True), (10, False)])
def test_pretrained(monkeypatch, num_classes, head_is_loaded):
    published = torchvision.models.resnet18().state_dict()
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: published)
    net = torchvision_classifier("resnet18", num_classes=num_classes, pretrained=True)
    assert torch.equal(net.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
    assert (net.fc.weight.shape == published["fc.weight"].shape) == head_is_loaded
    if head_is_loaded:
        assert torch.equal(net.fc.weight, published["fc.weight"])
