"""DeepTwist's step in anybody's loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import PROJECTIONS, Module, Net, Weights, bare_loop, distance, images, loader, quiet_trainer, sgd, weights

from lowrank_pl import SVD, BlockSVD, CompressionRatio, DeepTwist, FixedRank, TiledSVD, make_plan
from lowrank_pl.decompositions import Choice
from lowrank_pl.methods import distort_, is_due
from lowrank_pl.structures import Chain, Dense

METHODS = [SVD(), BlockSVD(4), TiledSVD(8), "spatial_svd", "tucker2"]


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("S_D", [1, 3, 7])
def test_due_when_a_multiple_has_been_passed(S_D, stride):
    """Once for every step that is, or jumps over, a multiple of S_D."""
    last, acted = 0, []
    for step in range(stride, 60, stride):
        if is_due(step, last, S_D):
            acted.append(step)
            last = step
    multiples = [m for m in range(S_D, 60, S_D) if m < 60 // stride * stride]
    passed = {step for step in range(stride, 60, stride) if any(step - stride < m <= step for m in multiples)}
    assert [s for s in acted if s in passed] == sorted(passed)
    assert len(acted) <= len(passed) + 1


def test_not_due_twice_at_one_step():
    assert is_due(200, 199, 200)
    assert not is_due(200, 200, 200)
    assert not is_due(399, 200, 200)
    assert is_due(401, 399, 200)


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_is_this_loop_bit_for_bit(tmp_path, method):
    net, (x, y) = Net(), images()
    optimizer, plan, last, after = sgd(net.parameters()), make_plan(net, method, FixedRank(2)), 0, {}
    for step in range(1, 7):
        loss = F.cross_entropy(net(x[step * 4 - 4 : step * 4]), y[step * 4 - 4 : step * 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if is_due(step, last, 2):
            distort_(plan)
            last = step
        after[step] = weights(net)
    watch = Weights()
    quiet_trainer(tmp_path, DeepTwist(2, method, FixedRank(2)), watch, max_epochs=1).fit(Module(), loader())
    assert all(distance(after[step], watch.after[step]) == 0 for step in after)


def test_what_a_distortion_says():
    net = Net()
    before = copy.deepcopy(net)
    plan = make_plan(net, "svd", {"conv2": FixedRank(2), "*": FixedRank(1000)})
    distortion = distort_(plan)
    assert distortion.choices == {"conv2": Choice(SVD(), (2,)), "fc1": Choice(SVD(), (16,))}
    assert isinstance(distortion.structures["conv2"].layout, Chain)
    assert isinstance(distortion.structures["fc1"].layout, Dense)
    weight = before.conv2.weight.detach()
    expected = PROJECTIONS["svd"](weight, 2)
    assert torch.allclose(net.conv2.weight.double(), expected, atol=1e-6)
    assert torch.equal(net.conv2.weight, distortion.structures["conv2"].reconstruct())
    assert torch.equal(net.fc1.weight, before.fc1.weight)  # would not be cheaper: dense, and untouched
    count = weight.numel() + net.fc1.weight.numel()
    assert distortion.delta_w == pytest.approx(float((weight - expected).square().sum()) / count, rel=1e-5)


def test_given_ranks_are_taken():
    plan = make_plan(Net(), "svd", CompressionRatio(2.0))
    given = {"conv2": Choice(SVD(), (1,)), "fc1": Choice(SVD(), (3,))}
    distortion = distort_(plan, given)
    assert distortion.choices == given
    assert {name: structure.rank for name, structure in distortion.structures.items()} == {"conv2": (1,), "fc1": (3,)}


def test_nothing_is_written_unless_all_can_be():
    net = Net()
    plan = make_plan(net, "svd", FixedRank(2))
    before = weights(net)
    with pytest.raises(ValueError, match="fc1"):
        distort_(plan, {"conv2": Choice(SVD(), (2,)), "fc1": Choice(SVD(), (-1,))})
    assert distance(before, weights(net)) == 0
    with torch.no_grad():
        net.fc1.weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match="fc1"):
        distort_(plan)
    assert torch.equal(net.conv2.weight, before["conv2.weight"])


def test_parameters_stay_the_same_objects():
    net = Net()
    parameters = {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    distort_(make_plan(net, "svd", FixedRank(2)))
    assert parameters == {name: (id(p), p.data_ptr()) for name, p in net.named_parameters()}
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())


def test_bare_loops_agree_with_themselves():
    """The reference of the callbacks' tests: without projections, nothing is projected."""
    plain = bare_loop(Net(), 2, (), None)
    low = bare_loop(Net(), 2, (2,), PROJECTIONS["svd"])
    assert distance(plain[1], low[1]) == 0
    assert distance(plain[2], low[2]) > 1e-2
