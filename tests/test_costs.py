"""What a layer costs, against PyTorch's own counter and with a clock of our own."""

import json

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, some_ranks, spec_on, supports
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl import CostBudget, CostPenalty, GreedyEnergy, compress
from lowrank_pl.adapters import find_maps
from lowrank_pl.compression import Compression
from lowrank_pl.costs import Latency, Macs, Params, price, resolve_cost
from lowrank_pl.costs import latency as latency_module
from lowrank_pl.decompositions import DENSE, SVD, ZERO, Cheapest, Choice, TiledSVD, Tucker2
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import spec_of
from lowrank_pl.models import LeNet300
from lowrank_pl.ranks import RankProblem, enumerate_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
PAIRS = [(d, name) for d in DECOMPOSITIONS for name in LAYERS if supports(d, make_layer(name)[0])]
CONV = spec_of(nn.Conv2d(12, 20, 3, padding=1)).with_(inputs=((1, 8, 8),))


def price_of(cost, layer, decomposition, rank):
    choice = Choice(decomposition, rank)
    return price(cost, choice, choice.layout(layer))


@pytest.mark.parametrize(("decomposition", "name"), PAIRS, ids=lambda x: str(x).replace(" ", ""))
def test_prices_are_what_is_deployed(decomposition, name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    for rank in some_ranks(decomposition.full_rank(spec)):
        structure = decomposition.factor(layer.weight.detach(), spec, rank)
        module = structure.with_layout(structure.layout.of_factors()).to_module(None).eval()
        assert price_of(Params(), spec, decomposition, rank) == sum(p.numel() for p in module.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x[:1])
        assert price_of(Macs(), spec, decomposition, rank) == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", LAYERS)
def test_prices_of_dense_layers_and_of_none(name):
    layer, x = make_layer(name)
    spec = spec_on(layer, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x[:1])
    assert price(Macs(), DENSE, DENSE.layout(spec)) == counter.get_total_flops() / 2
    assert price(Params(), DENSE, DENSE.layout(spec)) == layer.weight.numel()
    assert price(lambda stage: 7.0, DENSE, DENSE.layout(spec)) == 7.0
    for cost in (Macs(), Params(), Latency(), lambda stage: 7.0):
        assert price(cost, ZERO, ZERO.layout(spec)) == 0


def test_names_and_functions():
    assert resolve_cost("params") == Params()
    assert resolve_cost("macs") == Macs()
    assert isinstance(resolve_cost("latency"), Latency)
    assert resolve_cost(len) is len
    for bad in ("mac", None, 3):
        with pytest.raises(ValueError, match="latency, macs, params"):
            resolve_cost(bad)
    with pytest.raises(ValueError, match="example_input"):
        Macs()(spec_of(nn.Conv2d(3, 4, 3)))


class Clock:
    """Stands for the measurement: so many milliseconds per weight, and how often it was asked."""

    def __init__(self, monkeypatch, ms=lambda weights: weights / 1000):
        self.asked, self.ms = 0, ms
        monkeypatch.setattr(latency_module, "median_ms", self.measure)
        latency_module._tables.cache_clear()

    def measure(self, calls, device, seconds, rounds):
        self.asked += len(calls)
        return [self.ms(sum(p.numel() for p in call.args[0].parameters())) for call in calls]


def test_latency_is_measured_once_and_interpolated(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    latency = Latency(cache=str(tmp_path / "latency.json"), points=4)
    assert latency(CONV) == 1e6 * CONV.num_weights / 1000  # nanoseconds
    for r in range(1, 21):
        assert price_of(latency, CONV, SVD(), (r,)) == pytest.approx(1e6 * r * (20 + 108) / 1000)  # linear here
    asked = clock.asked
    assert asked == 1 + 4  # the dense layer, and ranks 1 to 20
    price_of(latency, CONV, SVD(), (7,))
    latency_module._tables.cache_clear()  # another process
    price_of(latency, CONV, SVD(), (7,))
    assert clock.asked == asked
    stored = json.loads((tmp_path / "latency.json").read_text())
    assert stored["conditions"] == latency.conditions()
    assert set(stored["conditions"]) == {"device", "threads", "dtype", "batch"}


def test_latency_of_several_entries_and_of_a_choice(monkeypatch, tmp_path):
    Clock(monkeypatch)
    latency = Latency(cache=str(tmp_path / "latency.json"), points=5)
    exact = [(12, 20), (1, 1), (12, 1)]
    for rank in exact:
        weights = sum(stage.num_weights for stage in Tucker2().layout(CONV, rank).stages)
        assert price_of(latency, CONV, Tucker2(), rank) == pytest.approx(1e3 * weights)
    for decomposition in (SVD(), Tucker2()):
        problem = RankProblem("", CONV, Cheapest("svd", "tucker2"), torch.randn(20, 12, 3, 3), least=0)
        found = enumerate_ranks(problem, latency)
        own = {choice.rank: cost for choice, cost in zip(found.choices, found.costs, strict=True)
               if choice.decomposition == decomposition}  # fmt: skip
        assert len(own) > 3
        assert own == {rank: price_of(latency, CONV, decomposition, rank) for rank in own}
        assert found.costs[found.index(DENSE)] == latency(CONV)
        assert found.costs[found.index(ZERO)] == 0
    both = Compression(find_maps(nn.Conv2d(12, 20, 3))[""], CONV, Cheapest("svd", "tucker2"), CostPenalty(1.0, latency))
    assert both.cost(latency, both.from_list([1, 5, 4])) == price_of(latency, CONV, Tucker2(), (5, 4))
    assert both.cost(latency, both.from_list([1, 12, 20])) == latency(CONV)  # no cheaper in weights
    linear = LayerSpec("linear", 30, 20, inputs=((4,),))
    assert price_of(latency, linear, TiledSVD(8), (8,)) > price_of(latency, linear, TiledSVD(8), (1,))


def test_latency_does_not_fall_with_the_rank(monkeypatch, tmp_path):
    noise = iter([3.0, 2.0, 5.0, 4.0, 6.0, 1.0])
    Clock(monkeypatch, ms=lambda weights: next(noise))
    latency = Latency(cache=str(tmp_path / "latency.json"), points=6)
    values = [price_of(latency, CONV, SVD(), (r,)) for r in range(1, 21)]
    assert values == sorted(values)
    assert max(values) == 6e6


def test_a_cache_of_other_conditions_is_refused(monkeypatch, tmp_path):
    Clock(monkeypatch)
    path = tmp_path / "latency.json"
    Latency(cache=str(path))(CONV)
    for change in ({"device": "another machine"}, {"threads": 77}, {"batch": 8}, {"dtype": "bfloat16"}):
        stored = json.loads(path.read_text())
        (key, value), *_ = change.items()
        path.write_text(json.dumps({**stored, "conditions": {**stored["conditions"], **change}}))
        with pytest.raises(ValueError, match=rf"{value}.*but this is"):
            Latency(cache=str(path)).check()
        path.write_text(json.dumps(stored))
    assert key in stored["conditions"]
    Latency(cache=str(path)).check()
    path.write_text('{"conditions": ')
    with pytest.raises(ValueError, match=r"Expected .* to be a latency cache"):
        Latency(cache=str(path)).check()


def test_by_default_the_file_names_its_conditions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Clock(monkeypatch)
    Latency(batch=4)(CONV)
    (path,) = (tmp_path / "lowrank_pl").iterdir()
    assert f"{torch.get_num_threads()}-float32-4" in path.name


def test_latency_for_real(tmp_path):
    latency = Latency(cache=str(tmp_path / "latency.json"), points=2)
    assert 0 < latency(CONV) < 1e9
    assert 0 < price_of(latency, CONV, SVD(), (1,)) <= price_of(latency, CONV, SVD(), (20,))


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"points": 0}, {"batch": 1.5}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        Latency(**arguments)
    with pytest.raises(ValueError, match="seen to run"):
        Latency()(spec_of(nn.Linear(3, 4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, None, "much"])
@pytest.mark.parametrize("rule", [lambda cost: CostBudget(cost, 0.5), lambda cost: GreedyEnergy(cost, 0.5),
                                  lambda cost: CostPenalty(1e-3, cost)])  # fmt: skip
def test_a_cost_that_is_no_number(rule, value):
    with pytest.raises(ValueError, match="`cost` to give a number of at least 0 but it gave"):
        compress(LeNet300(), "svd", rule(lambda layer: value))
