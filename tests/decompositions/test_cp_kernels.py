"""What CP promises beyond what every decomposition does."""

import pytest
import torch
from cases import make_layer

import lowrank_pl.decompositions.cp as module
from lowrank_pl.decompositions import CP
from lowrank_pl.layers import spec_of
from lowrank_pl.linalg import Root, cp_als, expand
from lowrank_pl.metric import Metric


@pytest.mark.parametrize("rank", [1, 9, 30])
@pytest.mark.parametrize("name", ["conv2d", "conv1d", "conv3d", "transposed2d"])
def test_all_links_are_equally_large(name, rank):
    layer, _ = make_layer(name)
    rank = min(rank, *CP().full_rank(spec_of(layer)))
    norms = [float(x.norm()) for x in CP().factor(layer.weight, spec_of(layer), (rank,)).tensors]
    assert norms == pytest.approx([norms[0]] * len(norms))


def test_the_sum_of_terms_written_out():
    layer, _ = make_layer("conv2d")
    structure = CP().factor(layer.weight, spec_of(layer), (5,))
    inputs, columns, rows, outputs = (x.flatten(1) for x in structure.tensors)
    expected = torch.einsum("rs,ry,rx,tr->tsyx", inputs, columns, rows, outputs)
    torch.testing.assert_close(structure.reconstruct(), expected)


def test_errors_are_measured_when_they_are_asked_for(monkeypatch):
    measured = []
    monkeypatch.setattr(module, "cp_als", lambda *args, **rest: measured.append(args[2]) or cp_als(*args, **rest))
    layer, _ = make_layer("conv2d")
    analysis = CP().analyze(layer.weight.detach(), spec_of(layer))
    analysis.factor((7,))
    assert measured == [7]
    first = analysis.errors
    assert measured == [7, 1, 2, 4, 8, 16, 32, 33]  # 33 terms of 26 weights have fewer than the layer's 864
    assert analysis.errors is first
    assert len(measured) == 8


def test_restarts(monkeypatch):
    given = []
    monkeypatch.setattr(module, "cp_als", lambda *args, **rest: given.append(args[3]) or cp_als(*args, **rest))
    layer, _ = make_layer("conv2d")
    CP(restarts=1).factor(layer.weight, spec_of(layer), (2,))
    assert given == [1]
    for bad in (-1, 1.0, None, True, "2"):
        with pytest.raises(ValueError, match=r"`restarts`.*but got"):
            CP(bad)


def test_in_a_metric_of_independent_modes_it_is_cp_of_the_whitened_kernel():
    """Where the second moment of the inputs is the product of those of channels, rows and columns."""
    layer, _ = make_layer("conv2d")
    spec, weight = spec_of(layer), layer.weight.detach()
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(n, 2 * n, generator=generator, dtype=torch.float64) for n in weight.shape]
    outputs, *inputs = [x @ x.T for x in draws]
    product = torch.kron(inputs[0], torch.kron(inputs[1], inputs[2]))
    metric = Metric(spec, Root.of(product.unsqueeze(0), 0.0), Root.of(outputs.unsqueeze(0), 0.0))
    white = torch.einsum("tshw,ta,sb,hc,wd->abcd", weight, *map(torch.linalg.cholesky, (outputs, *inputs)))
    for rank in (3, 10):
        _, expected = cp_als(white, expand(white), rank)
        found = CP().analyze(weight, spec, metric).marginal.factor((rank,)).reconstruct()
        assert metric.squared_norm(weight - found) == pytest.approx(expected, rel=1e-4)
