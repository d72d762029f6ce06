"""Weight decay on products of factors."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_pl import (
    CP,
    SVD,
    BlockSVD,
    FixedRank,
    SeparableSVD,
    SpatialSVD,
    Targets,
    TensorTrain,
    TiledSVD,
    Tucker2,
    compress,
)
from lowrank_pl.data import Digits
from lowrank_pl.decompositions import ZERO
from lowrank_pl.models import LeNet300
from lowrank_pl.module import Classifier
from lowrank_pl.planning import make_plan
from lowrank_pl.product_decay import deployed_layers, sum_of_squares
from lowrank_pl.ranks import RankRule
from lowrank_pl.runs import Training

ALL = Targets(skip_first=False, skip_last=False)
METHODS = [SVD(), SpatialSVD(), Tucker2(), SeparableSVD(), CP(), TiledSVD(tile=8), BlockSVD(channels=4), TensorTrain()]
LAYERS = {
    "linear": nn.Linear(24, 16),
    "convolution": nn.Conv2d(8, 16, 3, stride=2, padding=1),
    "grouped": nn.Conv2d(8, 16, 3, groups=2),
    "transposed": nn.ConvTranspose2d(8, 16, 3),
}


class Zeros(RankRule):
    """Leaves biases alone."""

    def __call__(self, problems, error_weight=1.0, others=()):
        return [ZERO] * len(problems)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_squares_of_factors_are_those_of_the_dense_weight(layer, method):
    """With rank 3 throughout."""
    torch.manual_seed(0)
    dense = nn.Sequential(LAYERS[layer], nn.Flatten())
    size = (24,) if layer == "linear" else (8, 5, 5)
    small = compress(dense, method, FixedRank(3), ALL, torch.randn(2, *size))
    expected = LAYERS[layer].weight.detach()
    if type(small[0]) is not type(LAYERS[layer]):
        expected = projection(LAYERS[layer], method)
    for net in (small, nn.Sequential(nn.ReLU(), small)):
        layers = deployed_layers(net)
        assert len(layers) == 1
        assert sum_of_squares(layers).item() == pytest.approx(expected.square().sum().item(), rel=1e-4)


def projection(layer, method):
    """The dense weight at rank 3, as the plan multiplies it out."""
    plan = make_plan(nn.Sequential(layer), method, FixedRank(3), ALL)
    return plan.factor(plan.choose_ranks())["0"].reconstruct()


def test_gradient_is_that_of_the_product():
    """d/dU of 1/2 ||U V||^2 is U V V^T, d/dV is U^T U V; a dense layer's is its weight, a bias has none."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2), nn.BatchNorm1d(2))
    net = compress(dense, "svd", FixedRank(2), Targets(include=["0"], skip_last=False))
    (sum_of_squares(deployed_layers(net)) / 2).backward()
    v, u = net[0][0].weight.detach(), net[0][1].weight.detach()
    torch.testing.assert_close(net[0][1].weight.grad, u @ v @ v.T)
    torch.testing.assert_close(net[0][0].weight.grad, u.T @ u @ v)
    torch.testing.assert_close(net[2].weight.grad, net[2].weight.detach())
    assert net[0][1].bias.grad is net[2].bias.grad is net[3].weight.grad is None


def test_layers_that_no_compression_made_are_counted_one_by_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    expected = sum(layer.weight.square().sum() for layer in net)
    torch.testing.assert_close(sum_of_squares(deployed_layers(net)), expected)


def test_a_layer_of_rank_0_has_nothing_to_decay():
    net = compress(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), "svd", Zeros(), ALL)
    assert float(sum_of_squares(deployed_layers(net))) == 0


def test_one_step_of_training_adds_the_decay(tmp_path):
    """Against autograd on `cross-entropy + decay/2 ||product||^2`; the logged loss is the cross-entropy alone."""
    pl.seed_everything(0)
    data = Digits(size=None, batch_size=2000)  # one batch
    net = compress(LeNet300(input_shape=(1, 8, 8)), "svd", FixedRank(4), ALL, torch.zeros(2, 1, 8, 8))
    images, labels = next(iter(data.train_dataloader()))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    products = sum((layer[1].weight @ layer[0].weight).square().sum() for layer in (net.fc1, net.fc2, net.fc3))
    cross_entropy = F.cross_entropy(net(images), labels)
    gradients = torch.autograd.grad(cross_entropy + 0.1 / 2 * products, list(net.parameters()))
    expected = {name: p - 0.5 * g for (name, p), g in zip(before.items(), gradients, strict=True)}
    module = Classifier(net, partial(torch.optim.SGD, lr=0.5), product_decay=0.1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet
    )
    trainer.fit(module, data)
    torch.testing.assert_close(dict(net.named_parameters()), expected)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("decay", [-1e-4, float("nan"), "1e-4", True])
def test_refused_before_anything_is_trained(decay):
    with pytest.raises(ValueError, match="number of at least 0"):
        Training(torch.optim.SGD, product_decay=decay)
    with pytest.raises(ValueError, match="number of at least 0"):
        Classifier(nn.Linear(2, 2), torch.optim.SGD, product_decay=decay)
