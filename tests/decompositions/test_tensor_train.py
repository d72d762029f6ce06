"""Which shapes tensor trains take, and their errors against tensorly's."""

import math

import numpy as np
import pytest
import tensorly
import torch
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import nn

from lowrank_pl import FixedRank, Targets, compress, make_plan
from lowrank_pl.decompositions import TensorTrain
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import TTLayer, spec_of
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric
from lowrank_pl.models import LeNet300

EVERYTHING = Targets(skip_first=False, skip_last=False)
GIVEN = TensorTrain(((2, 5), (4, 3)))
KERNELS = [
    (((2, 3), (3, 2)), 2), (((2, 3), (3, 2)), 5), (((4, 5, 5), (3, 5, 4)), 3), (((4, 5, 5), (3, 5, 4)), 9),
    (((2, 2, 2, 2), (3, 3, 3, 3)), 4), (((2, 2, 2, 2), (3, 3, 3, 3)), 20), (((1, 8, 3), (6, 1, 4)), 5),
    (((8, 4), (2, 9)), 7), (((3, 5, 2), (2, 7, 3)), 1), (((5, 6, 10), (14, 8, 7)), 12),
]  # fmt: skip


def linear(outputs, inputs):
    return LayerSpec("linear", inputs, outputs)


@pytest.mark.parametrize(("shape", "rank"), KERNELS, ids=str)
def test_no_worse_than_tensorly(shape, rank):
    rows, columns = shape
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(math.prod(rows), math.prod(columns), generator=generator, dtype=torch.float64)
    weight *= torch.arange(1, len(weight) + 1).pow(-0.5)[:, None]
    decomposition = TensorTrain(shape)
    spec = linear(*weight.shape)
    structure = decomposition.factor(weight, spec, (rank,))
    ranks = [1, *(core.shape[0] for core in structure.tensors[1:]), 1]
    theirs = tt_matrix_to_matrix(
        tensorly.decomposition.tensor_train_matrix(tensorly.tensor(weight.numpy().reshape(*rows, *columns)), ranks)
    )
    ours = float((structure.reconstruct() - weight).square().sum())
    assert ours <= np.square(theirs.reshape(weight.shape) - weight.numpy()).sum() * (1 + 1e-9)
    bound = float(decomposition.analyze(weight, spec).errors[0][rank])
    assert bound / (len(rows) - 1) * (1 - 1e-9) <= ours <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((300, 784), ((5, 6, 10), (14, 8, 7))),
        ((100, 300), ((4, 5, 5), (10, 6, 5))),
        ((10, 100), ((2, 5), (10, 10))),
        ((4096, 25088), ((4, 4, 4, 4, 4, 4), (8, 7, 7, 4, 4, 4))),
        ((16, 16), ((4, 4), (4, 4))),
        ((6, 6), ((2, 3), (3, 2))),
        ((7, 12), ((1, 7), (4, 3))),
        ((12, 7), ((3, 4), (7, 1))),
        ((1, 6), ((1, 1), (3, 2))),
        ((50257, 768), ((29, 1733), (32, 24))),
    ],
)
def test_chosen_shapes(sizes, shape):
    layout = TensorTrain().layout(linear(*sizes), (1,))
    assert (layout.rows, layout.columns) == shape
    assert tuple(map(math.prod, shape)) == sizes


@pytest.mark.parametrize("outputs", range(1, 41))
def test_every_size_but_primes_has_a_shape(outputs):
    def is_product(n):
        return any(n % i == 0 for i in range(2, n))

    for inputs in range(1, 41):
        reason = TensorTrain().unsupported(linear(outputs, inputs))
        assert (reason is None) == (is_product(outputs) or is_product(inputs))
        assert reason is None or f"{outputs} x {inputs}" in reason


def test_lenet300_is_compressed_by_default():
    net = compress(LeNet300(), "tensor_train", targets=EVERYTHING)
    layers = [net.get_submodule(name) for name in ("fc1", "fc2", "fc3")]
    assert all(isinstance(layer, TTLayer) for layer in layers)
    weights = [sum(core.numel() for core in layer.cores) for layer in layers]
    assert all(2 * n <= layer.spec.num_weights for n, layer in zip(weights, layers, strict=True))


@pytest.mark.parametrize(
    "shape", [((2, 3),), ((2, 3), (2,)), ((6,), (6,)), ((2, 0), (2, 3)), ((2, 3.0), (2, 3)), 5, ((2,) * 17, (2,) * 17)]
)
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="Expected argument `shape`"):
        TensorTrain(shape)


def test_lists_will_do():
    assert TensorTrain([[2, 5], [4, 3]]) == GIVEN
    assert hash(TensorTrain([[2, 5], [4, 3]])) == hash(GIVEN)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(12, 10), nn.Linear(10, 10), nn.Conv2d(10, 10, 3)


def test_a_shape_that_fits_some_layers_leaves_the_others_dense():
    plan = make_plan(Net(), GIVEN, FixedRank(1), EVERYTHING)
    assert [c.name for c in plan.compressions] == ["a"]
    assert plan.dense["b"] == "TensorTrain needs 10 outputs and 12 inputs, its `shape`, not 10 and 10"
    assert plan.dense["conv"] == "TensorTrain needs a linear layer"


@pytest.mark.parametrize("method", [{"b": GIVEN, "*": "svd"}, TensorTrain(((2, 5), (3, 3)))])
def test_a_shape_that_fits_no_layer_is_an_error(method):
    with pytest.raises(ValueError, match=r"Layer '[ab]': TensorTrain needs 10 outputs and .* its `shape`, not 10 and"):
        make_plan(Net(), method, FixedRank(1), EVERYTHING)


def test_a_shape_is_one_of_several_choices():
    plan = make_plan(Net(), {"b": [GIVEN, "svd"], "*": "svd"}, FixedRank(1), EVERYTHING)
    assert len(plan.compressions) == 3


def test_inputs_of_unequal_size_along_an_axis_count():
    """Without a refit, too: the marginal metrics alone tell which of the rows of an image are seen."""
    spec, shape = linear(12, 16), ((3, 4), (4, 4))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    seen = torch.tensor([1.0, 1e-2, 1e-2, 1.0]).double().repeat_interleave(4)
    metric = Metric(spec, Root.diagonal(seen[None]))
    found, plain = (TensorTrain(shape).analyze(weight, spec, m) for m in (metric, None))
    errors = [metric.squared_norm(weight - each.factor((4,)).reconstruct()) for each in (found.marginal, plain)]
    assert errors[0] < 0.5 * errors[1]
    # separable: there is nothing that a refit could do
    assert metric.squared_norm(weight - found.factor((4,)).reconstruct()) == pytest.approx(errors[0], rel=1e-6)


def test_a_layer_keeps_its_numbers():
    layer = nn.Linear(12, 10)
    structure = GIVEN.factor(layer.weight, spec_of(layer), (2,))
    assert [tuple(core.shape) for core in structure.tensors] == [(1, 2, 4, 2), (2, 5, 3, 1)]
    assert structure.layout.describe() == "cores 2x4 5x3, rank 2"
