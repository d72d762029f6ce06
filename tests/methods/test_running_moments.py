"""Running averages against a plain loop over inputs and gradients that autograd gives, unfolded by hand."""

import pytest
import torch
import torch.nn.functional as F
from nets import Net, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_pl.adapters import find_maps
from lowrank_pl.linalg import Root
from lowrank_pl.methods import RunningMoments
from lowrank_pl.planning import make_plan
from lowrank_pl.targets import Targets

ALL = Targets(skip_first=False, skip_last=False)
GEOMETRY = {"a": (1, 1), "b": (2, 1)}  # stride and padding


class Convolutions(nn.Module):
    """`b` has groups and runs twice in every forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.up, self.fc = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.b(torch.relu_(self.a(x)))
        return self.fc(torch.tanh(self.up(self.b(x))).mean((2, 3)))


def rows_of(name, x):
    """`[groups, n, columns]`, float64."""
    if name == "fc":
        return x.double()[None]
    if name == "up":
        return x.double().flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (2, -1)).transpose(0, 1)
    stride, padding = GEOMETRY[name]
    groups = 2 if name == "b" else 1
    patches = F.unfold(x.double(), 3, padding=padding, stride=stride)
    return patches.transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1)


def gradients_of(name, g):
    groups = 1 if name in ("a", "fc") else 2
    rows = g.double() if g.dim() == 2 else g.double().flatten(2).transpose(1, 2).flatten(0, 1)
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def step(net, i, scale=1.0):
    x, y = images()
    net.zero_grad()
    (scale * F.cross_entropy(net(x[i : i + 4]), y[i : i + 4])).backward()


def recorded(net, i):
    """What each layer is given and the gradients at its outputs, call by call."""
    given = {name: [] for name in ("a", "b", "up", "fc")}
    answers = {name: [] for name in given}

    def hook(name):
        def hear(module, args, output):
            given[name].append(args[0].detach().clone())
            output.register_hook(lambda g: answers[name].append(g))

        return hear

    handles = [net.get_submodule(name).register_forward_hook(hook(name)) for name in given]
    step(net, i)
    for handle in handles:
        handle.remove()
    return given, answers


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_running_averages(decay):
    net = Convolutions()
    moments = RunningMoments(decay, places=None, gradients=True)
    totals = {}
    for i in (0, 4, 8):
        given, answers = recorded(net, i)
        moments.start(net, ("a", "b", "up", "fc"), seed=i)
        step(net, i)
        moments.stop()
        squares = {n: torch.cat([gradients_of(n, g) for g in a], 1).square().mean() for n, a in answers.items()}
        scale = sum(squares.values()) / len(squares)
        for name in given:
            x = torch.cat([rows_of(name, x) for x in given[name]], 1)
            g = torch.cat([gradients_of(name, g) for g in answers[name]], 1) / scale.sqrt()
            old = totals.get(name, (0, 0, 0, 0))
            new = (x.mT @ x, x.shape[1], g.mT @ g, g.shape[1])
            totals[name] = tuple(decay * before + now for before, now in zip(old, new, strict=True))
    assert {name: m.shape[0] for name, (m, _) in moments.inputs.items()} == {"a": 1, "b": 2, "up": 2, "fc": 1}
    for name, (second, n, of_gradients, m) in totals.items():
        assert moments.inputs[name][1] == pytest.approx(n)
        torch.testing.assert_close(moments.inputs[name][0], second, rtol=1e-6, atol=1e-6)
        assert moments.outputs[name][1] == pytest.approx(m)
        torch.testing.assert_close(moments.outputs[name][0], of_gradients, rtol=1e-4, atol=1e-6)
    metrics = moments.metrics(make_plan(net, "svd", targets=ALL))
    for name, metric in metrics.items():
        expected = Root.of(totals[name][0] / totals[name][1]).matrix
        torch.testing.assert_close(metric.inputs.matrix, expected, rtol=1e-5, atol=1e-6)


def heard(net, scale=1.0, autocast=False, **settings):
    moments = RunningMoments(places=None, gradients=True, **settings)
    moments.start(net, find_maps(net), seed=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step(net, 0, scale)
    return moments, moments.stop()


def test_loss_scales_have_no_effect():
    (one, _), (other, _) = heard(Net()), heard(Net(), scale=2.0**16)
    for name in one.inputs:
        assert torch.equal(one.inputs[name][0], other.inputs[name][0])
        torch.testing.assert_close(one.outputs[name][0], other.outputs[name][0], rtol=1e-12, atol=0)
    squares = [m.diagonal(dim1=1, dim2=2).mean() / n for m, n in one.outputs.values()]
    assert len({round(float(s), 6) for s in squares}) == 4  # layers differ
    assert float(sum(squares)) / 4 == pytest.approx(1)


def test_under_autocast_sums_are_not_rounded():
    (exact, _), (moments, _) = heard(Net()), heard(Net(), autocast=True)
    for sums, others in ((exact.inputs, moments.inputs), (exact.outputs, moments.outputs)):
        for name, (total, _) in sums.items():
            found = others[name][0]
            assert found.dtype == torch.float64
            assert 0 < float((found - total).norm() / total.norm()) < 0.03 or name == "conv1"
            values = torch.linalg.eigvalsh(found)  # of a sum of squares, however many bits these had
            assert values.min() > -1e-12 * values.max()


def test_gradients_that_are_not_finite_are_left_out():
    moments, (names, is_finite) = heard(Net(), scale=float("inf"))
    assert names == {"conv1", "conv2", "fc1", "fc2"}
    assert not is_finite
    assert not moments.outputs
    assert moments.inputs


def test_inputs_that_are_not_finite_are_named():
    net = Net()
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] = float("nan")
    moments = RunningMoments()
    moments.start(net, ["conv2", "fc1"], seed=0)
    step(net, 0)
    with pytest.raises(ValueError, match="Layer 'conv2': expected finite inputs but found NaN or Inf"):
        moments.stop()
    assert not moments.is_listening
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Words(nn.Module):
    def __init__(self, repeated=False):
        super().__init__()
        self.table, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn, self.block, self.repeated = nn.LSTM(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), repeated

    def forward(self, x):
        x = self.table(x)
        x = self.rnn(self.attention(x, x, x)[0])[0]
        return checkpoint(self.block, x, use_reentrant=self.repeated == "reentrant") if self.repeated else self.block(x)


@pytest.mark.parametrize("repeated", [False, "reentrant", "new"])
def test_what_is_inside_and_what_is_repeated(repeated):
    """Sums of attention and hidden states are heard too; an activation checkpoint runs its layers twice."""
    net, moments = Words(repeated), RunningMoments(places=None, gradients=True)
    moments.start(net, find_maps(net), seed=0)
    net(torch.randint(0, 9, (5, 7))).square().sum().backward()
    moments.stop()
    names = {f"attention.{x}_proj" for x in ("q", "k", "v", "out")}
    names |= {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "block.0"}
    assert moments.inputs.keys() == names
    assert moments.outputs.keys() == {"block.0"}
    assert {count for _, count in moments.inputs.values()} == {35.0}
    assert moments.outputs["block.0"][1] == 35.0


def test_long_rows_have_a_diagonal(monkeypatch):
    net, whole = Convolutions(), None
    for longest in (8192, 7):
        monkeypatch.setattr("lowrank_pl.methods.running_moments.LONGEST", longest)
        moments, _ = heard(net)
        if whole is None:
            whole = moments
    for kind in ("inputs", "outputs"):
        for name, (total, _) in getattr(moments, kind).items():
            full = getattr(whole, kind)[name][0]
            expected = full.diagonal(dim1=1, dim2=2) if full.shape[2] > 7 else full
            torch.testing.assert_close(total, expected)
    plan = make_plan(net, ["svd", "tiled_svd"], targets=ALL)
    problems = plan.problems(moments.metrics(plan))
    assert any(p.metric.inputs.is_diagonal for p in problems.values())
    assert any(p.metric.outputs.is_diagonal for p in problems.values())
    for name, structure in plan.factor(plan.choose_ranks(problems), problems).items():
        weight = problems[name].weight
        assert problems[name].squared_norm(weight - structure.reconstruct()) < problems[name].squared_norm(weight)


def test_what_is_kept_is_exact():
    moments, _ = heard(Net())
    again = RunningMoments(gradients=True)
    again.load_state_dict(moments.state_dict())
    moments.keep(["conv2", "fc1"])
    plan = make_plan(Net(), "svd")
    for name, metric in moments.metrics(plan).items():
        other = again.metrics(plan)[name]
        assert torch.equal(metric.inputs.factor, other.inputs.factor)
        assert torch.equal(metric.outputs.factor, other.outputs.factor)
    assert moments.inputs.keys() == {"conv2", "fc1"} < again.inputs.keys()


def test_errors_are_comparable_whatever_the_unit_of_gradients():
    """Those of a layer without gradients count as those of an average layer with them."""
    moments, _ = heard(Net())
    plan = make_plan(Net(), "svd", targets=ALL)
    one = plan.problems(moments.metrics(plan))
    for name, (total, count) in moments.outputs.items():
        moments.outputs[name] = 49 * total, count
    moments._metrics = {}
    other = plan.problems(moments.metrics(plan))
    for name, problem in one.items():
        again = other[name]
        ratio = again.squared_norm(again.weight) / problem.squared_norm(problem.weight)
        assert ratio == pytest.approx(49)
        assert again.cost_weight / problem.cost_weight == pytest.approx(49)
