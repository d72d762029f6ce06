"""Both ways of a benchmark do the same work."""

import pytest
import torch

from lowrank_pl import benchmarks
from lowrank_pl.methods import c_step, distort_
from lowrank_pl.models import LeNet5
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import CostPenalty
from lowrank_pl.structures import Dense


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def test_tensor_trains_agree():
    dense, train = benchmarks.tensor_train_layers((4, 2, 3), (2, 7, 8), 3)
    x = torch.randn(5, 112)
    assert relative(train(x), dense(x)) < 1e-5


def test_projections_agree():
    torch.manual_seed(0)
    plan = make_plan(LeNet5(), "svd")
    before = {c.name: c.read().clone() for c in plan.compressions}
    distort_(plan)
    after = {c.name: c.read().clone() for c in plan.compressions}
    for c in plan.compressions:
        c.write_(before[c.name])
    benchmarks._svd_by_layer(plan)
    for c in plan.compressions:
        assert relative(c.read(), after[c.name]) < 1e-5
        assert relative(c.read(), before[c.name]) > 0.1


@pytest.mark.parametrize("lambda_", [1e-3, 1e-2])
def test_c_steps_agree(lambda_):
    torch.manual_seed(0)
    rule = CostPenalty(lambda_, "params")
    plan = make_plan(LeNet5(), "svd", rule, training=True)
    for c in plan.compressions:
        weight = c.read()
        falling = weight.flatten(1) * torch.arange(1, len(weight) + 1).pow(-0.7)[:, None]
        c.write_(falling.view_as(weight))
    state, _ = c_step(plan, rule, None, benchmarks.C_STEP_MU, benchmarks.C_STEP_MU)
    assert len({isinstance(structure.layout, Dense) for structure in state.structures.values()}) == 2
    for name, theta in benchmarks._c_step_by_layer(plan, rule).items():
        assert relative(theta, state.structures[name].reconstruct().flatten(1)) < 1e-4
