"""Benchmarks: ratios of things timed side by side, in turns, so that a busy machine slows both alike."""

from __future__ import annotations

import io
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_pl.callbacks import DeepTwist, LearningCompression
from lowrank_pl.callbacks.training_metric import MetricChoice
from lowrank_pl.compression import Plan
from lowrank_pl.data import EpochSampler, ImageSet
from lowrank_pl.files import write_files
from lowrank_pl.layers import TTLayer, spec_of
from lowrank_pl.methods import c_step, distort_
from lowrank_pl.methods.collecting import collect
from lowrank_pl.models import VGG, CifarResNet, LeNet5
from lowrank_pl.module import Classifier
from lowrank_pl.planning import make_plan
from lowrank_pl.ranks import CostPenalty
from lowrank_pl.ranks.cost_penalty import MILLION
from lowrank_pl.samples import Samples
from lowrank_pl.schedules import constant

C_STEP_MU = 0.01


@dataclass(frozen=True)
class Result:
    """Median seconds of two ways, and the median of their ratios."""

    name: str
    ways: tuple[str, str]
    seconds: tuple[float, float]
    ratio: float
    goal: str


def fit_overhead(repeats: int, S_D: int = 200, batch: int = 128) -> Result:
    """A fit of S_D steps with `DeepTwist(S_D)`, one distortion, against the same fit without; ResNet-32, CIFAR shapes.

    From the start of training to its last step: the first batch, in which the callback listens, and its table count.
    """
    images = _images(S_D * batch, (3, 32, 32), batch)

    def seconds(callbacks: list[pl.Callback]) -> float:
        clock = _Clock()
        _trainer(S_D, [*callbacks, clock]).fit(_classifier(CifarResNet(depth=32)), images)
        return clock.seconds

    plain, with_callback = _in_turns([lambda: seconds([]), lambda: seconds([DeepTwist(S_D=S_D)])], repeats)
    return _result("fit with DeepTwist / plain fit, ResNet-32", ("plain", "DeepTwist"), plain, with_callback, "<= 1.02")


def metric_overhead(repeats: int, S_D: int = 200, batch: int = 128) -> Result:
    """A fit of S_D steps with `DeepTwist(S_D, metric="inputs")`, one distortion, against one in Frobenius norm;
    ResNet-20, CIFAR shapes."""
    images = _images(S_D * batch, (3, 32, 32), batch)

    def seconds(metric: MetricChoice) -> float:
        clock = _Clock()
        _trainer(S_D, [DeepTwist(S_D, "svd", metric=metric), clock]).fit(_classifier(CifarResNet(depth=20)), images)
        return clock.seconds

    ways, names = [lambda: seconds("weights"), lambda: seconds("inputs")], ("weights", "inputs")
    plain, in_metric = _in_turns(ways, repeats)
    return _result("fit in the metric of inputs / in Frobenius norm, ResNet-20", names, plain, in_metric, "<= 1.05")


def projection_resnet32(repeats: int) -> Result:
    """Project all targets of ResNet-32 (SVD, 2x) against `torch.linalg.svd` layer by layer."""
    return _projection("ResNet-32", CifarResNet(depth=32), repeats, ">= 3")


def projection_vgg16(repeats: int) -> Result:
    """The same for VGG16."""
    return _projection("VGG16", VGG(depth=16), repeats, ">= 5")


def throughput_lenet5(repeats: int, steps: int = 150, batch: int = 256) -> Result:
    """LeNet5 on MNIST shapes as `lowrank-pl train` trains it, with DeepTwist, against a bare PyTorch loop."""
    images = _images(steps * batch, (1, 28, 28), batch)

    def lightning() -> float:
        clock = _Clock()
        callbacks = [DeepTwist(S_D=200, method="svd"), clock]
        _trainer(steps, callbacks).fit(_classifier(LeNet5()), images)
        return clock.seconds

    bare, ours = _in_turns([lambda: _bare_loop(LeNet5(), images), lightning], repeats)
    ratios = [a / b for a, b in zip(bare, ours, strict=True)]
    medians = (statistics.median(bare), statistics.median(ours))
    return Result(
        "throughput / bare loop, LeNet5", ("bare", "lowrank-pl"), medians, statistics.median(ratios), ">= 0.9"
    )


def lc_overhead(repeats: int, epochs: int = 4, batches: int = 60, batch: int = 256) -> Result:
    """A fit with `LearningCompression`, an epoch per L step, against a plain fit of as many epochs; LeNet5."""
    images = _images(batches * batch, (1, 28, 28), batch)
    lc = {"lambda_": 1e-3, "mu0": 1e-3, "growth": 1.5, "steps": epochs + 1, "l_step_epochs": 1}

    def seconds(callbacks: list[pl.Callback]) -> float:
        clock = _Clock()
        _trainer(epochs * batches, [*callbacks, clock]).fit(_classifier(LeNet5()), images)
        return clock.seconds

    ways = [lambda: seconds([]), lambda: seconds([LearningCompression(**lc)])]  # type: ignore[arg-type]
    plain, with_callback = _in_turns(ways, repeats)
    return _result("fit with LC / plain fit, LeNet5", ("plain", "LC"), plain, with_callback, "<= 1.10")


def c_step_vgg16(repeats: int) -> Result:
    """One C step over VGG16 (spectra, choice of ranks, projections) against the same with `torch.linalg.svd`.

    The kernels' singular values fall as in trained networks, so that less than half of the weights are left.
    """
    net, rule = VGG(depth=16), CostPenalty(3e-4, "params")
    plan = make_plan(net, "svd", rule, training=True)
    for c in plan.compressions:
        c.write_((c.read().flatten(1).T * torch.arange(1, len(c.read()) + 1).pow(-0.7)).T.view_as(c.read()))

    def ours() -> float:
        return _seconds(lambda plan: c_step(plan, rule, None, C_STEP_MU, C_STEP_MU), plan)

    ours()  # what depends on shapes alone is remembered
    first, second = _in_turns([ours, lambda: _seconds(partial(_c_step_by_layer, rule=rule), plan)], repeats)
    return _result("torch.linalg.svd / C step, VGG16", ("C step", "svd"), first, second, ">= 5")


def moments_resnet20(repeats: int, count: int = 3000, batch: int = 128) -> Result:
    """Second moments of what all targets of ResNet-20 are given, 10 places of each image, against running it."""
    net, images = CifarResNet(depth=20).eval(), list(torch.randn(count, 3, 32, 32).split(batch))
    compressions, samples = make_plan(net, "svd").compressions, Samples(images)

    def plain() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for x in images:
                net(x)
        return time.perf_counter() - start

    def ours() -> float:
        start = time.perf_counter()
        collect(net, compressions, samples)
        return time.perf_counter() - start

    first, second = _in_turns([plain, ours], repeats)
    return _result("moments / forward passes, ResNet-20", ("forward", "moments"), first, second, "<= 3")


def tensor_train(repeats: int) -> list[Result]:
    """The first linear layer of VGG16, 25088 to 4096, against its tensor train of six cores, on one thread: Novikov et
    al. (NIPS 2015), table 3, ranks of 4: 13 times faster at batch 1, and level at 100."""
    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for rank in (4, 8):
            layers = tensor_train_layers((4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4), rank)
            for batch, goal in ((1, ">= 5"), (100, ">= 1")):
                x = torch.randn(batch, layers[0].in_features)
                calls = max(10 // batch, 1)
                dense, train = _in_turns([partial(_seconds_of_calls, layer, x, calls) for layer in layers], repeats)
                name = f"dense layer / tensor train, 25088 x 4096, rank {rank}, batch {batch}, one thread"
                results.append(_result(name, ("train", "dense"), train, dense, goal))
    finally:
        torch.set_num_threads(threads)
    return results


def tensor_train_layers(rows: tuple[int, ...], columns: tuple[int, ...], rank: int) -> tuple[nn.Linear, TTLayer]:
    """A dense layer and a tensor train that compute the same."""
    dense = nn.Linear(math.prod(columns), math.prod(rows))
    train = TTLayer(spec_of(dense), rows, columns, rank, bias=True, run="factors")
    with torch.no_grad():
        dense.weight.copy_(train.dense_weight())
        train.bias = dense.bias
    return dense, train


ALL: dict[str, Callable[[int], Result | list[Result]]] = {
    function.__name__: function
    for function in (
        fit_overhead,
        metric_overhead,
        projection_resnet32,
        projection_vgg16,
        throughput_lenet5,
        lc_overhead,
        c_step_vgg16,
        moments_resnet20,
        tensor_train,
    )
}


def run(names: list[str], repeats: int) -> list[Result]:
    """The named benchmarks, one after another."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found = [ALL[name](repeats) for name in names]
    return [result for each in found for result in (each if isinstance(each, list) else [each])]


def table(results: list[Result]) -> Table:
    """The results, for a terminal."""
    caption = f"medians of side-by-side repeats, {torch.get_num_threads()} threads"
    grid = Table("benchmark", "seconds", "ratio", "goal", box=box.SIMPLE_HEAD, caption=caption)
    for r in results:
        seconds = ", ".join(f"{way} {s:.3g}" for way, s in zip(r.ways, r.seconds, strict=True))
        grid.add_row(r.name, seconds, f"{r.ratio:.3f}", r.goal)
    return grid


def write(results: list[Result], path: Path) -> None:
    """The results as JSON."""
    write_files({path: json.dumps([asdict(result) for result in results], indent=1).encode()})


class _Clock(pl.Callback):
    """Seconds from the start of training to the end of its last batch; stands last among the callbacks."""

    seconds = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def _in_turns(ways: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    rounds = [[way() for way in ways] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _result(name: str, ways: tuple[str, str], first: list[float], second: list[float], goal: str) -> Result:
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return Result(name, ways, (statistics.median(first), statistics.median(second)), statistics.median(ratios), goal)


def _projection(name: str, net: nn.Module, repeats: int, goal: str) -> Result:
    plan = make_plan(net, method="svd")
    ours, reference = _in_turns([lambda: _seconds(distort_, plan), lambda: _seconds(_svd_by_layer, plan)], repeats)
    return _result(f"torch.linalg.svd / projection, {name}", ("projection", "svd"), ours, reference, goal)


def _svd_by_layer(plan: Plan) -> None:
    """What a user would write: a float32 SVD of each lowered kernel, truncated and multiplied out."""
    choices = plan.choose_ranks()
    for c in plan.compressions:
        (rank,), weight = choices[c.name].rank, c.read()
        left, singular, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        c.write_(((left[:, :rank] * singular[:rank]) @ right[:rank]).view_as(weight))


def _c_step_by_layer(plan: Plan, rule: CostPenalty) -> dict[str, Tensor]:
    """What a user would write: the same choices from a float32 SVD of each lowered kernel."""
    thetas = {}
    for c in plan.compressions:
        matrix = c.read().flatten(1)
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        errors = singular.square().flip(0).cumsum(0).flip(0)  # of ranks 0, 1, ..., full - 1
        costs = torch.arange(len(errors)) * sum(matrix.shape)
        price = rule.lambda_ / MILLION * float(matrix.square().sum())
        total = torch.where(costs < matrix.numel(), price * costs + C_STEP_MU / 2 * errors, float("inf"))
        r = int(total.argmin())
        dense = price * matrix.numel() < total[r]
        thetas[c.name] = matrix if dense else (left[:, :r] * singular[:r]) @ right[:r]
        float((matrix - thetas[c.name]).square().sum())
    return thetas


def _seconds(function: Callable[[Plan], Any], plan: Plan) -> float:
    start = time.perf_counter()
    function(plan)
    return time.perf_counter() - start


@torch.no_grad()
def _seconds_of_calls(layer: nn.Module, x: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return (time.perf_counter() - start) / calls


def _bare_loop(net: nn.Module, images: DataLoader[Any]) -> float:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    start = time.perf_counter()
    for x, y in images:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return time.perf_counter() - start


def _classifier(net: nn.Module) -> Classifier:
    return Classifier(net, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), constant)


def _trainer(steps: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip


def _images(count: int, shape: tuple[int, ...], batch: int) -> DataLoader[Any]:
    """Random images through the loader that `lowrank-pl train` uses."""
    generator = torch.Generator().manual_seed(0)
    pool: Tensor = torch.randint(0, 256, (min(count, 4096), *shape), dtype=torch.uint8, generator=generator)
    chosen = torch.arange(count) % len(pool)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = ImageSet(pool[chosen], labels, torch.full((shape[0], 1, 1), 0.5), torch.full((shape[0], 1, 1), 0.25))
    return DataLoader(images, sampler=EpochSampler(count, batch, True, 0), batch_size=None)
