"""Times side by side: what the bounds of a ratio mean, and a network against itself on a busy machine."""

import copy
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom

from lowrank_pl.models import CifarResNet
from lowrank_pl.timing import MachineWatch, Ratio, times_ms


@contextmanager
def busy(count):
    """Other processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("rounds", [1, 2, 5, 10, 11, 12, 20, 21, 41, 81, 200])
def test_bounds_are_those_of_the_binomial_distribution(rounds):
    """As many values on either side as leaves the median outside in one of a thousand cases, by scipy."""
    after = np.ones(rounds)
    before = np.random.default_rng(rounds).permutation(np.arange(1, rounds + 1))
    found = Ratio.of(list(before), list(after))
    assert found.value == pytest.approx(np.median(before))
    outside = int(found.low) - 1
    assert found.high == rounds - outside
    # with `outside` values below the lower bound, it misses when at most so many of all lie below the median
    assert outside == 0 or 2 * binom.cdf(outside, rounds, 0.5) <= 1e-3
    assert 2 * binom.cdf(outside + 1, rounds, 0.5) > 1e-3


def test_bounds_hold_the_median_of_skewed_times():
    """Of 5,000 experiments with 21 rounds of heavy-tailed noise, about 5 at most may miss."""
    noise = np.random.default_rng(0)
    missed = 0
    for _ in range(5000):
        before, after = (1 + noise.pareto(1.0, 21) for _ in range(2))
        missed += not Ratio.of(list(before), list(after)).is_even
    assert missed <= 12


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(Ratio(1.8, 1.7, 1.9), "1.80x (1.70-1.90)"), (Ratio(1.02, 0.95, 1.1), "1.02x (0.95-1.10), even"),
     (Ratio(1.0, 1.0, 1.0), "1.00x"), (Ratio(0.7, 0.66, 0.74), "0.70x (0.66-0.74)")],
)  # fmt: skip
def test_a_ratio_in_words(ratio, text):
    assert str(ratio) == text


def test_slow_is_told_from_fast():
    slow, fast = times_ms([partial(time.sleep, 0.006), partial(time.sleep, 0.002)], seconds=0.1, rounds=12)
    found = Ratio.of(slow, fast)
    assert 1.5 < found.low <= found.value <= found.high
    assert not found.is_even


def test_a_machine_that_becomes_slow_ends_the_rounds():
    calls = []

    def slower():
        calls.append(None)
        time.sleep(0.0005 if len(calls) < 4 else 0.05)

    (times,) = times_ms([slower], seconds=0.02, rounds=40)
    assert 5 <= len(times) < 20


def test_other_processes_are_noticed():
    watch = MachineWatch()
    time.sleep(0.3)
    assert watch.state()["cores"] >= 1
    if "others" not in watch.state():
        pytest.skip("the system does not tell")
    own = MachineWatch()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    with busy(1):
        other = MachineWatch()
        time.sleep(0.8)
        assert other.state()["others"] >= 0.4
    assert own.state().keys() >= {"cores", "others"}


@pytest.mark.slow
def test_a_network_against_itself_beside_two_busy_processes():
    """Even, in 20 of 20 runs; one of three times the depth is not."""
    x = torch.randn(1, 3, 32, 32)
    nets = [CifarResNet(20).eval(), CifarResNet(56).eval()]
    runs = [torch.inference_mode()(partial(net, x)) for net in (nets[0], copy.deepcopy(nets[0]), nets[1])]
    with busy(2):
        for _ in range(20):
            assert Ratio.of(*times_ms(runs[:2], seconds=0.4, rounds=81)).is_even
        found = Ratio.of(*times_ms([runs[2], runs[0]], seconds=0.4, rounds=81))
    assert not found.is_even
    assert found.value > 1.5
