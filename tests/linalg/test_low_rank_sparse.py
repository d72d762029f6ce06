"""Low rank + sparse against long runs of exact alternation: generalized SVD and iterative hard thresholding."""

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowrank_pl.linalg import Alternation, Quadratic, Root, godec, grebdec, prune

COUNTS = ((3, 0.05), (3, 0.2), (8, 0.1))


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight that is about low rank and spiky, the second moments of rectified features, and of gradients."""
    generator = torch.Generator().manual_seed(seed)
    low = draw(generator, rows, rows // 8) @ draw(generator, rows // 8, columns) / (rows / 8) ** 0.5
    spikes = draw(generator, rows, columns) * (torch.rand(rows, columns, generator=generator) < 0.05)
    latent = draw(generator, 3 * columns, columns // 4) @ draw(generator, columns // 4, columns) / (columns / 4) ** 0.5
    features = (latent + 0.5 * draw(generator, 3 * columns, columns)).relu() * draw(generator, columns).mul(0.5).exp()
    gradients = draw(generator, 2 * rows, rows)
    target = 0.5 * low + 0.5 * draw(generator, rows, columns) + 2 * spikes
    return target, features.T @ features / len(features), gradients.T @ gradients / len(gradients)


def exact_alternation(target: Tensor, a: Tensor, rank: int, count: int, rounds: int) -> float:
    """The error at its end; steps of `1 / lambda_max`."""
    values, vectors = torch.linalg.eigh(a)
    root, sparse, low = vectors * values.clamp(min=0).sqrt(), torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(rounds):
        if rank:
            left = torch.linalg.svd((target - sparse) @ root, full_matrices=False)[0][:, :rank]
            low = left @ (left.T @ (target - sparse))
        for _ in range(20):
            moved = sparse - (sparse + low - target) @ a / values[-1]
            sparse = moved * (moved.abs() >= moved.abs().flatten().topk(count).values[-1])
    error = sparse + low - target
    return float(((error @ a) * error).sum())


def watched(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The error after every step of whatever runs."""
    errors: list[float] = []
    for name in ("move_low", "move_sparse"):
        step = getattr(Alternation, name)

        def watch(state: Alternation, *args: Tensor, step=step) -> None:
            step(state, *args)
            errors.append(state.error)
            exact = state.form.norm(state.low + state.sparse - state.target)
            assert state.error == pytest.approx(exact, rel=1e-8, abs=1e-9 * state.form.norm(state.target))

        monkeypatch.setattr(Alternation, name, watch)
    return errors


@pytest.mark.parametrize(("rank", "share"), COUNTS)
def test_grebdec_is_as_near_as_a_long_exact_alternation(rank: int, share: float, monkeypatch) -> None:
    target, a, _ = make_problem(32, 144)
    errors, count = watched(monkeypatch), round(share * target.numel())
    state = grebdec(target, Quadratic(None, Root.of(a)), count, rank)
    assert state.error <= 1.01 * exact_alternation(target, a, rank, count, rounds=100)
    assert all(after <= before for before, after in pairwise(errors))
    assert torch.linalg.matrix_rank(state.low) == rank
    assert int(state.mask.sum()) == count
    assert not state.sparse[~state.mask].any()


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_pruning_in_a_metric(share: float) -> None:
    target, a, _ = make_problem(32, 144)
    count = round(share * target.numel())
    state = prune(target, Quadratic(None, Root.of(a)), count)
    assert state.error <= 1.01 * exact_alternation(target, a, 0, count, rounds=20)
    assert not state.low.any()


def test_pruning_without_a_metric_keeps_the_largest() -> None:
    target, _, _ = make_problem(16, 40)
    state = prune(target, Quadratic(), 100)
    kept = target.abs() >= target.abs().flatten().sort(descending=True).values[99]
    torch.testing.assert_close(state.sparse, target * kept)


def test_outputs_and_groups(monkeypatch) -> None:
    """In both roots, as the same problem with the outputs turned; groups share the nonzeros."""
    problems = [make_problem(16, 40, seed) for seed in (0, 1)]
    target, a, b = (torch.stack(each) for each in zip(*problems, strict=True))
    errors, form = watched(monkeypatch), Quadratic(Root.of(b), Root.of(a))
    state = grebdec(target, form, 150, 3)
    assert all(after <= before for before, after in pairwise(errors))

    def project(x: Tensor) -> Tensor:
        left, right = (torch.linalg.cholesky(m + 1e-6 * m.diagonal(dim1=1, dim2=2).mean() * torch.eye(m.shape[-1]))
                       for m in (b, a))  # fmt: skip
        u, s, v = torch.linalg.svd(left.mT @ x @ right, full_matrices=False)
        best = (u[..., :3] * s[..., None, :3]) @ v[..., :3, :]
        return torch.linalg.solve(right, torch.linalg.solve(left.mT, best), left=False)

    largest = torch.linalg.eigvalsh(a)[:, -1:, None] * torch.linalg.eigvalsh(b)[:, -1:, None]
    low, sparse = torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(100):
        low = project(target - sparse)
        for _ in range(20):
            moved = sparse - form.times(sparse + low - target) / largest
            gains = moved.abs() * largest.sqrt()
            sparse = moved * (gains >= gains.flatten().topk(150).values[-1])
    assert state.error <= 1.01 * form.norm(sparse + low - target)
    assert [int(torch.linalg.matrix_rank(low)) for low in state.low] == [3, 3]


def test_godec_recovers_what_is_low_rank_and_sparse() -> None:
    generator = torch.Generator().manual_seed(0)
    low = draw(generator, 40, 2) @ draw(generator, 2, 60)
    sparse = 20 * draw(generator, 40, 60) * (torch.rand(40, 60, generator=generator) < 0.02)

    def project(x: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return (u[:, :2] * s[:2]) @ v[:2]

    state = godec(low + sparse, Quadratic(), int((sparse != 0).sum()), project)
    assert state.error <= 1e-3 * float(sparse.square().sum())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_grebdec_is_ten_times_faster() -> None:
    """512 x 4608, one thread: exact alternation is given ten times as long, and its error is still larger."""
    target, a, _ = make_problem(512, 4608)
    begin = time.process_time()
    state = grebdec(target, Quadratic(None, Root.of(a)), target.numel() // 10, 32)
    ours = time.process_time() - begin
    begin = time.process_time()
    exact_alternation(target, a, 32, target.numel() // 10, rounds=1)
    one = time.process_time() - begin
    assert exact_alternation(target, a, 32, target.numel() // 10, rounds=round(10 * ours / one)) > state.error
