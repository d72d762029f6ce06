"""Training a sparse layer: zeros stay zero under every optimizer, also from a checkpoint."""

import io

import pytest
import torch
from torch import nn

from lowrank_pl.decompositions import Decomposition, LowRankPlusSparse, TensorTrain, TiledSVD
from lowrank_pl.layers import SparseLayer, packed, spec_of

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 6, 7, 7, generator=generator)
        (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rank", [(0, 40), (2, 40), (0, 4)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero(name: str, rank: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3, padding=1)
    module = LowRankPlusSparse().factor(layer.weight, spec_of(layer), rank).to_module(layer.bias)
    sparse = next(part for part in module.modules() if isinstance(part, SparseLayer))
    before, optimizer = (sparse.weight + 0).detach().clone(), OPTIMIZERS[name](module.parameters())
    train(module, optimizer, 5, seed=0)
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(module, optimizer, 5, seed=1)
    after = (sparse.weight + 0).detach()
    assert torch.equal(after != 0, before != 0)
    assert (after[before != 0] != before[before != 0]).all()

    other = LowRankPlusSparse().factor(torch.randn_like(layer.weight), spec_of(layer), rank).to_module(layer.bias)
    again, file = OPTIMIZERS[name](other.parameters()), io.BytesIO(file.getvalue())
    state = torch.load(file)
    other.load_state_dict(state["module"])
    again.load_state_dict(state["optimizer"])
    train(other, again, 5, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 3, 4, 60, 119, 120])
def test_places_take_few_bytes(count: int) -> None:
    spec = spec_of(nn.Linear(12, 10))
    places = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:count].sort().values
    where = packed(places, spec)
    assert where.numel() * where.element_size() == min(4 * count, 15)
    layer = SparseLayer(spec, count, bias=False)
    layer.where = where
    nn.init.ones_(layer.values)
    assert torch.equal((layer.weight + 0).flatten().nonzero().flatten(), places)


def test_a_fresh_layer_can_be_trained() -> None:
    torch.manual_seed(0)
    layer = SparseLayer(spec_of(nn.Linear(256, 256)), 6000, bias=True)
    assert 0.3 < float(layer(torch.randn(64, 256)).detach().std()) < 3


@pytest.mark.parametrize(
    ("decomposition", "layer"),
    [(LowRankPlusSparse(share=1, run="dense"), nn.Linear(24, 24)),
     (LowRankPlusSparse(share=1, run="csr"), nn.Linear(24, 24)),
     (TensorTrain(run="dense"), nn.Linear(24, 24)), (TiledSVD(4, "dense"), nn.Conv2d(8, 8, 3))],
    ids=repr,
)  # fmt: skip
def test_writes_past_pytorch_are_noticed_in_the_next_mode(decomposition: Decomposition, layer: nn.Module) -> None:
    """Through `.data`, which counts no versions: as averages of weights are often kept."""
    spec = spec_of(layer)
    rank = decomposition.within(spec, spec.num_weights / 2)
    module = decomposition.factor(layer.weight, spec, rank).to_module(layer.bias).eval()
    x = torch.randn(2, 24) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        assert module(x).norm() > 0
        for parameter in module.parameters():
            parameter.data.mul_(0)
        assert module.train().eval()(x).norm() == 0


@pytest.mark.parametrize("count", [40, 4])  # a bit for every weight, and numbers
def test_places_that_cannot_be_are_not_loaded(count: int) -> None:
    layer = nn.Conv2d(6, 9, 3)
    module = LowRankPlusSparse().factor(layer.weight, spec_of(layer), (0, count)).to_module(layer.bias)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for bad in (torch.zeros_like(state["where"]), torch.full_like(state["where"], 127)):
        with pytest.raises(RuntimeError, match=rf"where: expected {count} ascending places of 486"):
            module.load_state_dict({**state, "where": bad})
    module.load_state_dict(state)
    module.load_state_dict(state, assign=True)
