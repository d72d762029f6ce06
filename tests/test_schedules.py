"""Learning-rate schedules against their formulas."""

import math

import pytest
import torch

from lowrank_pl import schedules


def rates(schedule, steps, total_steps=20, steps_per_epoch=5, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = schedule(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **arguments)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


def test_constant():
    assert rates(schedules.constant, 7, total_steps=math.inf) == [0.2] * 7


def test_cosine():
    expected = [0.1 * (1 + math.cos(math.pi * step / 20)) for step in range(21)]
    assert rates(schedules.cosine, 21) == pytest.approx(expected)
    assert rates(schedules.cosine, 25)[20:] == pytest.approx([0] * 5)


def test_cosine_without_an_end():
    with pytest.raises(ValueError, match="max_epochs"):
        rates(schedules.cosine, 1, total_steps=math.inf)


def test_step_decay():
    expected = [0.2] * 10 + [0.02] * 5 + [0.002] * 5
    assert rates(schedules.step_decay, 20, milestones=[2, 3]) == pytest.approx(expected)
    assert rates(schedules.step_decay, 6, milestones=[], gamma=0.5) == [0.2] * 6


@pytest.mark.parametrize("milestones", [[3, 2], [-1]])
def test_bad_milestones(milestones):
    with pytest.raises(ValueError, match="`milestones`"):
        rates(schedules.step_decay, 1, milestones=milestones)


def test_exponential():
    expected = [0.2 * 0.9 ** (step // 5) for step in range(20)]
    assert rates(schedules.exponential, 20, gamma=0.9) == pytest.approx(expected)
