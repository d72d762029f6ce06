"""Batch norms between factors: what they compute, what is left of them, and networks with them on disk."""

import copy
import json

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, some_ranks, spec_on, supports
from nets import Net, images
from torch import nn

from lowrank_pl import (
    FixedRank,
    SpatialSVD,
    Targets,
    compress,
    fold_norms_,
    from_scratch,
    load_compressed,
    save_compressed,
    summarize,
)
from lowrank_pl.exporting import disagreement, export, load_exported
from lowrank_pl.extraction import RECORD
from lowrank_pl.layers import FactorChain
from lowrank_pl.models import CifarResNet
from lowrank_pl.product_decay import deployed_layers, sum_of_squares
from lowrank_pl.storage import checksum
from lowrank_pl.structures import Chain, layout_from_dict

ALL = Targets(skip_first=False, skip_last=False)
PAIRS = [
    (d, name)
    for d in DECOMPOSITIONS
    for name in LAYERS
    if "linear" not in name
    and supports(d, make_layer(name)[0])
    and isinstance(d.layout(spec_on(*make_layer(name)), (1,) * len(d.full_rank(spec_on(*make_layer(name))))), Chain)
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def chain_with_norms(decomposition, name):
    """In evaluation mode, with norms that have seen something and have learnt something; inputs; the layer."""
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    rank = some_ranks(decomposition.full_rank(spec))[-1]
    chain = decomposition.factor(layer.weight.detach(), spec, rank).to_module(layer.bias)
    chain.insert_norms_()
    generator = torch.Generator().manual_seed(0)
    for norm in chain.norms:
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.data.normal_(generator=generator)
        norm.running_var.uniform_(0.1, 3.0, generator=generator)
    return chain.eval(), x, layer


@pytest.mark.parametrize(("decomposition", "name"), PAIRS, ids=lambda x: str(x).replace(" ", ""))
def test_folded_norms_compute_the_same(decomposition, name):
    """Whatever the padding, at the edges too; the norms by PyTorch's own formula."""
    chain, x, _ = chain_with_norms(decomposition, name)
    links = [module for key, module in chain.named_children() if key.isdigit()]
    expected = x
    for link, norm in zip(links, [*chain.norms, None], strict=True):
        expected = link(expected)
        if norm is not None:
            expected = torch.batch_norm(
                expected, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, 1e-5, False
            )
    torch.testing.assert_close(chain(x), expected, rtol=1e-12, atol=1e-12)
    weight = chain.layout.weight(chain.layout.tensors(chain))
    chain.fold_norms_()
    assert not chain.norms
    assert {type(module) for module in chain} == {type(link) for link in links}
    torch.testing.assert_close(chain(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chain.layout.weight(chain.layout.tensors(chain)), weight, rtol=1e-12, atol=1e-12)


def test_layouts_say_what_stands_between():
    chain, _, layer = chain_with_norms(SpatialSVD(), "conv2d")
    spec = chain.layout.layer.with_(inputs=())
    for between in ("norms", "biases"):
        stored = chain.layout.to_dict()
        assert stored["between"] == between
        again = layout_from_dict(json.loads(json.dumps(stored)), spec)
        assert again.to_dict() == stored
        empty = again.build(layer.bias is not None).double()
        assert {k: v.shape for k, v in empty.state_dict().items()} == {
            k: v.shape for k, v in chain.state_dict().items()
        }
        chain.fold_norms_()
    with pytest.raises(ValueError, match="Expected a chain"):
        layout_from_dict({**stored, "between": "nothing"}, spec)
    assert "between" not in Chain(spec, chain.layout.links).to_dict()


def trained(method="spatial_svd", net=None, steps=4):
    """From scratch with norms, a few steps."""
    torch.manual_seed(0)
    x, labels = images(steps)
    out = from_scratch(Net(norm=True) if net is None else net, method, FixedRank(2), ALL, x[:4], norm_between=True)
    optimizer = torch.optim.SGD(out.parameters(), lr=0.1, momentum=0.9)
    out.train()
    for batch, label in zip(x.split(4), labels.split(4), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(out(batch), label).backward()
        optimizer.step()
    return out.eval()


@pytest.mark.parametrize("method", ["spatial_svd", "svd", "tucker2", "block_svd"])
def test_a_trained_network_keeps_its_outputs(method):
    out, (x, _) = trained(method), images()
    with torch.no_grad():
        expected = out(x)
        assert len([m for m in out.modules() if isinstance(m, nn.BatchNorm2d)]) > 1
        fold_norms_(out)
        assert len([m for m in out.modules() if isinstance(m, nn.BatchNorm2d)]) == 1  # the network's own
        torch.testing.assert_close(out(x), expected, rtol=1e-4, atol=1e-5)
        before = copy.deepcopy(out.state_dict())
        fold_norms_(out)  # again: nothing is left to do
        assert all(torch.equal(before[name], value) for name, value in out.state_dict().items())
    assert all(p.requires_grad for p in out.parameters())


@pytest.mark.parametrize("fold", [False, True])
def test_saved_and_loaded(fold, tmp_path):
    out, (x, _) = trained(), images()
    if fold:
        fold_norms_(out)
    save_compressed(out, tmp_path)
    loaded = load_compressed(Net(norm=True), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), out(x))
    assert {m.layout.between for m in loaded.modules() if isinstance(m, FactorChain) and m.layout.layer.kernel} == {
        "biases" if fold else "norms"
    }
    fold_norms_(loaded)
    save_compressed(loaded, tmp_path / "again")
    again = load_compressed(Net(norm=True), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x), out(x), rtol=1e-4, atol=1e-5)
    report = summarize(Net(norm=True), again, x[:4])
    assert report.compressed.params == sum(p.numel() for p in again.parameters())


def test_a_folder_that_says_something_else_is_refused(tmp_path):
    out = trained()
    fold_norms_(out)
    save_compressed(out, tmp_path)
    for between, words in (
        ("norms", "network: 'conv2.0.bias'"),
        (None, "network: 'conv2.0.bias'"),
        ("sand", "Expected a chain"),
    ):
        structure = json.loads((tmp_path / "structure.json").read_text())
        structure["layers"]["conv2"]["structure"]["between"] = between
        structure["sha256"] = checksum((tmp_path / "model.safetensors").read_bytes(), structure)
        (tmp_path / "structure.json").write_text(json.dumps(structure))
        with pytest.raises(ValueError, match=words):
            load_compressed(Net(norm=True), tmp_path)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize("fold", [False, True])
def test_exported(suffix, fold, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    x = images()[0]
    net = trained(net=CifarResNet(depth=8, input_shape=(3, 8, 8), num_classes=4))
    if fold:
        fold_norms_(net)
    assert export(net, x[:5], tmp_path / f"model.{suffix}") < 1e-4
    with torch.no_grad():
        assert disagreement(load_exported(tmp_path / f"model.{suffix}")(x), net(x)) < 1e-4


def test_script_runs_it():
    out, (x, _) = trained(), images()
    with torch.no_grad():
        expected = out(x)
        assert torch.equal(torch.jit.script(out)(x), expected)
        fold_norms_(out)
        torch.testing.assert_close(torch.jit.script(out)(x), expected, rtol=1e-4, atol=1e-5)


def test_decay_of_products_is_that_of_the_weights_that_will_be_deployed():
    out = trained()
    squares = sum_of_squares(deployed_layers(out))
    squares.backward()
    chain = out.get_submodule("conv2")
    assert all(float(p.grad.abs().max()) > 0 for p in (chain.norms[0].weight, chain.get_parameter("0.weight")))
    fold_norms_(out)
    folded = sum_of_squares(deployed_layers(out))
    assert float(folded.detach()) == pytest.approx(float(squares.detach()), rel=1e-5)
    kernels = sum(float(m.weight.detach().float().square().sum()) for m in deployed_layers(out))
    assert float(folded.detach()) == pytest.approx(kernels, rel=1e-5)


def test_frozen_layers_get_frozen_norms_and_earlier_layers_none():
    net = Net(norm=True)
    net.conv2.requires_grad_(False)
    out = from_scratch(net, "svd", FixedRank(2), Targets(include=["conv*"], skip_first=False), norm_between=True)
    assert not any(p.requires_grad for p in out.conv2.parameters())
    assert all(p.requires_grad for p in out.conv1.parameters())
    earlier = compress(Net(), "svd", FixedRank(2), Targets(include=["conv1"], skip_first=False))
    out = from_scratch(earlier, "svd", FixedRank(2), Targets(["conv2"], skip_first=False), norm_between=True)
    assert [len(out.conv1.norms), len(out.conv2.norms)] == [0, 1]
    assert "between" not in getattr(out, RECORD)["layers"]["conv1"]["structure"]


def test_a_network_that_is_one_layer():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8)
    out = from_scratch(nn.Conv2d(6, 8, 3), "tucker2", FixedRank(3), ALL, x, norm_between=True)
    out(x)
    out.eval()
    with torch.no_grad():
        expected = out(x)
        assert [key for key, _ in out.named_children()] == ["0", "norm0", "1", "norm1", "2"]
        fold_norms_(out)
        torch.testing.assert_close(out(x), expected)
