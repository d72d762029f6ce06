"""Both ways of a benchmark do the same work."""

import pytest
import torch

from lowrank_pl import benchmarks
from lowrank_pl.compression import make_plan
from lowrank_pl.decompositions import Dense
from lowrank_pl.methods import c_step, distort_
from lowrank_pl.models import LeNet5
from lowrank_pl.ranks import CostPenalty


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def test_projections_agree():
    torch.manual_seed(0)
    plan = make_plan(LeNet5(), "svd")
    before = {c.name: c.weight.clone() for c in plan.compressions}
    distort_(plan)
    after = {c.name: c.weight.clone() for c in plan.compressions}
    for c in plan.compressions:
        c.weight.copy_(before[c.name])
    benchmarks._svd_by_layer(plan)
    for c in plan.compressions:
        assert relative(c.weight, after[c.name]) < 1e-5
        assert relative(c.weight, before[c.name]) > 0.1


@pytest.mark.parametrize("lambda_", [1e-3, 1e-2])
def test_c_steps_agree(lambda_):
    torch.manual_seed(0)
    rule = CostPenalty(lambda_, "params")
    plan = make_plan(LeNet5(), "svd", rule, training=True)
    for c in plan.compressions:
        c.weight.flatten(1).mul_(torch.arange(1, len(c.weight) + 1).pow(-0.7)[:, None])
    state, _ = c_step(plan, rule, None, benchmarks.C_STEP_MU, benchmarks.C_STEP_MU)
    assert len({isinstance(structure, Dense) for structure in state.structures.values()}) == 2
    for name, theta in benchmarks._c_step_by_layer(plan, rule).items():
        assert relative(theta, state.structures[name].reconstruct().flatten(1)) < 1e-4
