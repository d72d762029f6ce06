"""The papers' networks, and torchvision's."""

from lowrank_pl.models.lenet import LeNet5, LeNet300
from lowrank_pl.models.nin import NIN
from lowrank_pl.models.resnet import CifarResNet
from lowrank_pl.models.torchvision_classifier import torchvision_classifier
from lowrank_pl.models.vgg import VGG
from lowrank_pl.models.weights import load_weights

__all__ = ["NIN", "VGG", "CifarResNet", "LeNet5", "LeNet300", "load_weights", "torchvision_classifier"]
