"""Low rank + sparse: its special cases, what rules make of it, metrics, and where it goes."""

import pytest
import torch
from cases import make_layer, make_problem
from torch import nn

from lowrank_pl import CompressionRatio, compress, load_compressed, save_compressed, summarize
from lowrank_pl.decompositions import SVD, LowRankPlusSparse, TiledSVD, Tucker2
from lowrank_pl.exporting import export
from lowrank_pl.layers import spec_of
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric, columns_of
from lowrank_pl.ranks import CostBudget, FixedRank, RankFraction
from lowrank_pl.structures import Sparse, Sum
from lowrank_pl.targets import Targets

NAMES = ("linear", "conv2d", "conv2d_grouped", "transposed2d_strides")
each_name = pytest.mark.parametrize("name", NAMES)


def make_metric(spec, seed=0):
    size = columns_of(spec)
    x = torch.randn(spec.groups, 3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x @ torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).relu()
    return Metric(spec, Root.of(x.mT @ x))


@each_name
def test_special_cases(name):
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach()
    for metric in (None, make_metric(spec)):
        alone, low = SVD().factor(weight, spec, (2,), metric), LowRankPlusSparse().factor(weight, spec, (2, 0), metric)
        assert low.layout == alone.layout
        assert all(map(torch.equal, low.tensors, alone.tensors))
    pruned = LowRankPlusSparse().factor(weight, spec, (0, 20))
    assert pruned.layout == Sparse(spec, 20)
    kept = weight.abs() >= weight.abs().flatten().sort(descending=True).values[19]
    torch.testing.assert_close(pruned.reconstruct(), weight * kept)
    with pytest.raises(ValueError, match=r"Expected a rank from \(0, 0\) to .*, with a part that is above 0, but got"):
        LowRankPlusSparse().factor(weight, spec, (0, 0))


@each_name
@pytest.mark.parametrize("low_rank", [SVD(), TiledSVD(4)], ids=str)
def test_in_a_metric_it_is_not_worse_than_frobenius_refitted(name, low_rank):
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach()
    metric, method = make_metric(spec), LowRankPlusSparse(low_rank)
    for rank in ((1, 10), (2, weight.numel() // 3), (0, 30)):
        found = method.factor(weight, spec, rank, metric)
        plain = method.factor(weight, spec, rank)
        tensors = plain.tensors
        if isinstance(plain.layout, Sum):
            *_, sparse = plain.layout.split(plain.tensors)
            rest = weight - plain.layout.parts[1].weight(sparse)
            tensors = (*low_rank.factor(rest, spec, rank[:1], metric).tensors, *sparse)
        errors = [metric.squared_norm(weight - each) for each in (found.reconstruct(), plain.layout.weight(tensors))]
        assert errors[0] <= errors[1] * (1 + 1e-9)


def test_names_and_arguments():
    assert LowRankPlusSparse("tucker2") == LowRankPlusSparse(Tucker2())
    with pytest.raises(ValueError, match="Unknown `low_rank` 'nothing'"):
        LowRankPlusSparse("nothing")
    with pytest.raises(ValueError, match="another structure"):
        LowRankPlusSparse(LowRankPlusSparse())
    for bad in (-0.1, 1.1, "half", None):
        with pytest.raises(ValueError, match="`share`"):
            LowRankPlusSparse(share=bad)
    with pytest.raises(ValueError, match="`run`"):
        LowRankPlusSparse(run="2:4")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_share(share):
    """Of the stored values, for rules that grow both parts together."""
    method = LowRankPlusSparse(share=share)
    problem = make_problem(method, "conv2d")  # 12 x 72: 84 values for each rank
    for rule in (CompressionRatio(2.0), RankFraction(0.5)):
        ((low, nonzeros),) = (choice.rank for choice in rule([problem]))
        stored = 84 * low + nonzeros
        assert low == int((1 - share) * 432 // 84)
        assert stored == (432 if share else 84 * low)
    ((low, nonzeros),) = (choice.rank for choice in FixedRank(2)([problem]))
    assert (low, nonzeros) == {0.0: (2, 0), 0.3: (2, 72), 0.5: (2, 168), 1.0: (0, 168)}[share]


def test_budgets_find_what_a_weight_is_made_of():
    """A low-rank weight gets rank, a spiky one nonzeros."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(12, 2, generator=generator) @ torch.randn(2, 72, generator=generator)
    spikes = torch.zeros(864).index_fill(0, torch.randperm(864, generator=generator)[:100], 5.0)
    noise = 0.01 * torch.randn(12, 8, 3, 3, generator=generator)
    for weight, wants in ((low.view(12, 8, 3, 3) + noise, 0), (spikes.view(12, 8, 3, 3) + noise, 1)):
        problem = make_problem(LowRankPlusSparse(), "conv2d", torch.float32)
        object.__setattr__(problem, "weight", weight)
        (choice,) = CostBudget("params", 0.25)([problem])
        assert (choice.rank[0] >= 2) == (wants == 0)
        assert (choice.rank[1] >= 90) == (wants == 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.body(x)


EVERY = Targets(skip_first=False, skip_last=False)


@pytest.mark.parametrize("run", ["dense", "csr"])
def test_saved_loaded_exported_and_reported(run, tmp_path):
    net, images = Net().eval(), torch.randn(4, 3, 8, 8)
    small = compress(net, LowRankPlusSparse(run=run), CompressionRatio(3.0), EVERY, images).eval()
    with torch.no_grad():
        expected = small(images)
        save_compressed(small, tmp_path / "small")
        assert torch.equal(load_compressed(net, tmp_path / "small")(images), expected)
        for suffix in ("pt2", "onnx"):
            if suffix == "onnx":
                pytest.importorskip("onnxruntime")
            assert export(small, images, tmp_path / f"net.{suffix}") <= 1e-5
    report = summarize(net, small, images, latency=False)
    state = small.state_dict()
    assert report.compressed.index_bytes == sum(v.numel() * v.element_size() for k, v in state.items() if "where" in k)
    assert report.compressed.index_bytes > 0
    assert report.compressed.macs == sum(layer.compressed.macs for layer in report.layers)
    assert "index bytes" in report.to_markdown()
    assert "index bytes" not in summarize(net, compress(net, "svd"), images, latency=False).to_markdown()


@pytest.mark.parametrize("reconstruct", ["outputs", "asymmetric", "nonlinear"])
def test_reconstruction(reconstruct):
    """Nearer to the outputs than nearest to the weights, with as many values."""
    generator, net = torch.Generator().manual_seed(0), Net().eval()
    data = [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(6)]
    errors = []
    for options in ({"metric": "weights"}, {"reconstruct": reconstruct}):
        small = compress(net, LowRankPlusSparse(run="dense"), CompressionRatio(4.0), EVERY, data=data, **options)
        with torch.no_grad():
            errors.append(float((small.eval()(data[-1]) - net(data[-1])).square().mean()))
    assert errors[1] < errors[0]
