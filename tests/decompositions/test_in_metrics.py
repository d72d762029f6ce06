"""What every decomposition promises in every metric, on every kind of layer; `SVD` against brute force."""

import math
from dataclasses import replace

import pytest
import torch
from cases import DECOMPOSITIONS, LAYERS, make_layer, some_ranks, supports

from lowrank_pl.decompositions import CP, SVD, LowRankPlusSparse, SeparableSVD
from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import as_operator, spec_of
from lowrank_pl.linalg import Root
from lowrank_pl.metric import Metric, grouped
from lowrank_pl.structures import sweep

SUPPORTED = [(d, name) for d in DECOMPOSITIONS for name in LAYERS if supports(d, make_layer(name)[0])]
KINDS = ("full", "deficient", "diagonal", "samples", "outputs", "both")
each_pair = pytest.mark.parametrize(("decomposition", "name"), SUPPORTED, ids=lambda x: str(x).replace(" ", ""))
each_kind = pytest.mark.parametrize("kind", KINDS)


def columns(spec):
    per_group = spec.in_channels // spec.groups
    return per_group if spec.kind == "conv_transpose" else per_group * math.prod(spec.kernel)


def samples(spec, count, size, seed):
    """Correlated and of very different sizes, as features are: `[groups, count, size]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mixed = draw(spec.groups, count, size) @ draw(size, size)
    return mixed * torch.logspace(0, -2, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]


def make_metric(spec, kind, scale=1.0):
    """And the matrices A and B that it stands for, `[groups, n, n]`."""
    size, rows = columns(spec), spec.out_channels // spec.groups
    x = samples(spec, max(size // 2, 1) if kind == "deficient" else 3 * size + 5, size, 1) * scale**0.5
    g = samples(spec, 3 * rows + 5, rows, 2)
    second, of_gradients = x.mT @ x / x.shape[1], g.mT @ g / g.shape[1]
    inputs = {
        "diagonal": lambda: Root.diagonal(second.diagonal(dim1=1, dim2=2)),
        "samples": lambda: Root.from_samples(x / x.shape[1] ** 0.5, torch.zeros(spec.groups, dtype=torch.float64)),
        "outputs": lambda: None,
    }.get(kind, lambda: Root.of(second))()
    outputs = Root.of(of_gradients) if kind in ("outputs", "both") else None
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    matrix = torch.eye(size).double() if inputs is None else second + 1e-6 * mean * torch.eye(size)
    if kind == "diagonal":
        matrix = torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
    mean = of_gradients.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    other = of_gradients + 1e-6 * mean * torch.eye(rows) if outputs is not None else torch.eye(rows).double()
    return Metric(spec, inputs, outputs), matrix, other


def squared(spec, weight, a, b):
    """The squared norm, written out."""
    matrices = grouped(weight.double(), spec).flatten(2).unflatten(2, (a.shape[-1], -1))  # places of the kernel last
    a, b = (each.expand(spec.groups, *each.shape[-2:]) for each in (a, b))
    return float(torch.einsum("gtsk,gsz,gtu,guzk->", matrices, a, b, matrices))


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_squared_norm(name, kind):
    layer, _ = make_layer(name)
    spec = spec_of(layer)
    metric, a, b = make_metric(spec, kind)
    weight = layer.weight.detach().double()
    expected = squared(spec, weight, a, b)
    assert metric.squared_norm(weight) == pytest.approx(expected, rel=1e-9)
    weight.requires_grad_()
    white = metric.whiten(grouped(weight, spec))
    (metric.outputs.times(white.mT) if metric.outputs else white).square().sum().backward()
    torch.testing.assert_close(metric.times(weight), weight.grad / 2, rtol=1e-9, atol=1e-9 * expected**0.5)
    assert float((weight.detach() * metric.times(weight)).sum()) == pytest.approx(expected, rel=1e-9)


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_bounded(name, kind):
    """Against the eigenvalues of the whole matrices."""
    spec = spec_of(make_layer(name)[0])
    metric, a, b = make_metric(spec, kind)
    for root, matrix in ((metric.inputs, a), (metric.outputs, b)):
        if root is None:
            continue
        values, vectors = torch.linalg.eigh(matrix.expand_as(root.matrix))
        most = float(values.median())
        expected = vectors @ torch.diag_embed(values.clamp(max=most)) @ vectors.mT
        size = {"rtol": 1e-5, "atol": 1e-5 * float(values.max())}
        torch.testing.assert_close(root.bounded(most).matrix, expected, **size)
        torch.testing.assert_close(root.bounded(2 * float(values.max())).matrix, root.matrix, **size)
    found = metric.bounded(0.3)
    assert found.largest <= 0.3 * (1 + 1e-9)
    assert (found.inputs is None, found.outputs is None) == (metric.inputs is None, metric.outputs is None)


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_normalized(name, kind):
    """Against eigenvalues of the whole matrices; and what a checkpoint keeps of it is exact."""
    spec = spec_of(make_layer(name)[0])
    metric, a, b = make_metric(spec, kind, scale=1e4)
    found, largest = metric.normalized(0.1), 1.0
    for root, matrix in ((found.inputs, a), (found.outputs, b)):
        if root is None:
            continue
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        expected = (matrix / mean + 0.1 * torch.eye(matrix.shape[-1])) / 1.1
        torch.testing.assert_close(root.matrix, expected.expand_as(root.matrix), rtol=1e-6, atol=1e-5)
        largest *= float(torch.linalg.eigvalsh(expected).max())
    assert found.largest == pytest.approx(largest, rel=1e-5)
    again = Metric.from_state_dict(spec, found.state_dict(), torch.device("cpu"))
    weight = torch.randn(spec.stored_shape).double()
    assert torch.equal(again.times(weight), found.times(weight))


@each_kind
@each_pair
def test_projections(decomposition, name, kind):
    """Never worse than the projection in Frobenius norm, nothing lost at full rank, the same whatever the unit."""
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach().double()
    metric, _, _ = make_metric(spec, kind)
    energy = metric.squared_norm(weight)
    analysis = decomposition.analyze(weight, spec, metric)
    full = decomposition.full_rank(spec)
    for tails in analysis.errors:
        assert float(tails[0]) == pytest.approx(energy, rel=1e-9)
        assert (tails.diff() <= 1e-12 * energy).all()
        assert abs(float(tails[-1])) <= 1e-9 * energy
    errors = []
    for rank in some_ranks(full):
        errors.append(metric.squared_norm(weight - analysis.factor(rank).reconstruct()))
        plain = decomposition.factor(weight, spec, rank).reconstruct()
        assert errors[-1] <= metric.squared_norm(weight - plain) + 1e-10 * energy
    assert errors[-1] <= 1e-12 * energy
    projected = analysis.factor(full).reconstruct()
    assert float((projected - weight).norm()) <= 1e-6 * float(weight.norm())
    other, _, _ = make_metric(spec, kind, scale=1e6)
    middle = some_ranks(full)[len(some_ranks(full)) // 2]
    again = decomposition.factor(weight, spec, middle, other).reconstruct()
    assert metric.squared_norm(analysis.factor(middle).reconstruct() - again) <= 1e-9 * energy


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS, ids=lambda x: str(x).replace(" ", ""))
def test_never_worse_where_outputs_are_alike(decomposition):
    """Moments of rank 3 and 4: refits that take outputs to weigh alike go far astray there."""
    spec, generator = LayerSpec("linear", 12, 18), torch.Generator().manual_seed(1)
    if decomposition.unsupported(spec):
        pytest.skip("not for this layer")
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for _ in range(10):
        weight, x, g = draw(18, 12), draw(4, 12), draw(3, 18)
        metric = Metric(spec, Root.of((x.mT @ x)[None]), Root.of((g.mT @ g)[None]))
        found, plain = decomposition.analyze(weight, spec, metric), decomposition.analyze(weight, spec)
        for rank in some_ranks(decomposition.full_rank(spec)):
            errors = [metric.squared_norm(weight - each.factor(rank).reconstruct()) for each in (found, plain)]
            assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-10 * metric.squared_norm(weight)


@each_pair
def test_without_preference_it_is_frobenius(decomposition, name):
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach().double()
    size, rows = columns(spec), spec.out_channels // spec.groups
    eye = [Root.of(torch.eye(n).double().expand(spec.groups, n, n)) for n in (size, rows)]
    for metric in (Metric(spec), Metric(spec, eye[0]), Metric(spec, *eye)):
        scale = metric.squared_norm(weight) / float(weight.square().sum())
        assert scale == pytest.approx(1, rel=1e-5)
        found, plain = decomposition.analyze(weight, spec, metric), decomposition.analyze(weight, spec)
        for mine, theirs in zip(found.errors, plain.errors, strict=True):
            assert torch.allclose(mine, scale * theirs, rtol=1e-6, atol=1e-9 * float(theirs[0]))
        for rank in some_ranks(decomposition.full_rank(spec)):
            ours, theirs = found.factor(rank).reconstruct(), plain.factor(rank).reconstruct()
            error = [float((weight - each).square().sum()) for each in (ours, theirs)]
            # separable SVD goes stage by stage, CP has a penalty, low rank + sparse local optima; in metrics the last
            # factor is refitted then
            least = {SeparableSVD: 0.9, CP: 0.9, LowRankPlusSparse: 0.0}.get(type(decomposition), 1 - 1e-6)
            slack = 1e-12 * float(plain.errors[0][0])
            assert least * error[1] - slack <= error[0] <= (1 + 1e-6) * error[1] + slack


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_svd_is_the_reduced_rank_regression(name, kind):
    """Its errors are exact, and those of brute force: `B^(-1/2) T_r(B^(1/2) W A^(1/2)) A^(-1/2)`."""
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach().double()
    metric, a, b = make_metric(spec, kind)
    a, b = (m.expand(spec.groups, *m.shape[-2:]) for m in (a, b))
    operator = as_operator(weight, spec).unflatten(0, (spec.groups, -1))
    matrices = operator.flatten(2)
    if spec.kind == "conv_transpose":  # the adjoint's matrix, S x (T d d)
        matrices = operator.transpose(1, 2).flatten(2)
        places = math.prod(spec.kernel)
        a, b = torch.stack([torch.kron(m, torch.eye(places).double()) for m in b]), a
    roots = []
    for each in (b, a):
        values, vectors = torch.linalg.eigh(each)
        roots.append(vectors * values.sqrt().unsqueeze(-2) @ vectors.mT)
    u, s, v = torch.linalg.svd(roots[0] @ matrices @ roots[1], full_matrices=False)
    analysis = SVD().analyze(weight, spec, metric)
    for rank in some_ranks(SVD().full_rank(spec)):
        (r,) = rank
        best = torch.linalg.solve(roots[0], (u[..., :r] * s[..., None, :r]) @ v[..., :r, :])
        best = torch.linalg.solve(roots[1], best, left=False)
        found = as_operator(analysis.factor(rank).reconstruct(), spec).unflatten(0, (spec.groups, -1))
        found = found.transpose(1, 2).flatten(2) if spec.kind == "conv_transpose" else found.flatten(2)
        energy = float(s.square().sum())
        assert float((roots[0] @ (found - best) @ roots[1]).square().sum()) <= 1e-12 * energy
        assert float(analysis.errors[0][r]) == pytest.approx(float(s[..., r:].square().sum()), abs=1e-9 * energy)


@pytest.mark.parametrize(
    ("decomposition", "name"),
    [(d, name) for d, name in SUPPORTED if name in ("linear", "conv2d_strides", "conv2d_grouped", "transposed2d")],
    ids=lambda x: str(x).replace(" ", ""),
)
def test_sweeps(decomposition, name):
    """Never worse for another sweep; from the projection in Frobenius norm they lead to the best SVD."""
    layer, _ = make_layer(name)
    spec, weight = spec_of(layer), layer.weight.detach().double()
    metric, _, _ = make_metric(spec, "both")
    rank = some_ranks(decomposition.full_rank(spec))[len(some_ranks(decomposition.full_rank(spec))) // 2]
    errors = []
    for sweeps in (0, 1, 2):
        each = replace(metric, sweeps=sweeps)
        errors.append(each.squared_norm(weight - decomposition.factor(weight, spec, rank, each).reconstruct()))
    if not isinstance(decomposition, LowRankPlusSparse):  # whose low-rank part is swept before the sparse one is found
        assert errors[2] <= errors[1] * (1 + 1e-9) <= errors[0] * (1 + 2e-9) + 1e-18
    plain = decomposition.factor(weight, spec, rank)
    tensors, before = plain.tensors, metric.squared_norm(weight - plain.reconstruct())
    for _ in range(2):
        tensors = sweep(plain.layout, tensors, weight, metric)
        after = metric.squared_norm(weight - plain.with_tensors(tensors).reconstruct())
        assert after <= before * (1 + 1e-9) + 1e-18
        before = after


def test_sweeps_find_the_best_svd():
    layer, _ = make_layer("conv2d")
    spec, weight = spec_of(layer), layer.weight.detach().double()
    metric, _, _ = make_metric(spec, "both")
    best = metric.squared_norm(weight - SVD().factor(weight, spec, (3,), metric).reconstruct())
    plain = SVD().factor(weight, spec, (3,))
    tensors = plain.tensors
    for _ in range(20):
        tensors = sweep(plain.layout, tensors, weight, metric)
    assert metric.squared_norm(weight - plain.with_tensors(tensors).reconstruct()) == pytest.approx(best, rel=5e-3)


def test_a_metric_of_another_layer_is_refused():
    spec = spec_of(make_layer("conv2d_grouped")[0])
    with pytest.raises(ValueError, match=r"Expected `inputs` to be the root of moments \[2, 36, 36\]"):
        Metric(spec, Root.of(torch.eye(36)))
    with pytest.raises(ValueError, match="Expected `outputs`"):
        Metric(spec, None, Root.of(torch.eye(5).expand(2, 5, 5)))
