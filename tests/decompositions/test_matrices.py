"""Which matrices are truncated, written out with loops, against numpy's SVD; and what is deployed."""

import math

import numpy as np
import pytest
import torch
from cases import LAYERS, make_layer, some_ranks, supports
from torch import nn

from lowrank_pl.decompositions import CP, SVD, BlockSVD, SeparableSVD, SpatialSVD, TiledSVD, Tucker2
from lowrank_pl.layers import spec_of

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def truncate(matrix, rank):
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def project_svd(weight, layer, rank):
    """Group by group; rows are outputs, of a transposed convolution inputs: the first axis in either case."""
    result = np.empty_like(weight)
    size = len(weight) // getattr(layer, "groups", 1)
    for start in range(0, len(weight), size):
        block = weight[start : start + size]
        result[start : start + size] = truncate(block.reshape(size, -1), rank).reshape(block.shape)
    return result


def operators(weight, layer):
    """Each group's `[T, S, *kernel]`, views of the weight."""
    blocks = np.split(weight, layer.groups)
    return [block.swapaxes(0, 1) for block in blocks] if isinstance(layer, TRANSPOSED) else blocks


def project_spatial(weight, layer, rank):
    projected = np.empty_like(weight)
    for block, result in zip(operators(weight, layer), operators(projected, layer), strict=True):
        outputs, inputs, height, width = block.shape
        matrix = np.empty((outputs * width, inputs * height))
        for t, s, y, x in np.ndindex(block.shape):
            matrix[t * width + x, s * height + y] = block[t, s, y, x]
        matrix = truncate(matrix, rank)
        for t, s, y, x in np.ndindex(block.shape):
            result[t, s, y, x] = matrix[t * width + x, s * height + y]
    return projected


def project_separable(weight, layer, columns, rows):
    """The outputs' principal directions, then spatial SVD of what is left: at most `rows d` ranks."""
    kernel = weight.swapaxes(0, 1) if isinstance(layer, TRANSPOSED) else weight
    left, _, _ = np.linalg.svd(kernel.reshape(len(kernel), -1), full_matrices=False)
    narrow = np.tensordot(left[:, :rows].T, kernel, 1)
    spatial = project_spatial(np.ascontiguousarray(narrow), nn.Conv2d(kernel.shape[1], rows, 1), columns)
    projected = np.tensordot(left[:, :rows], spatial, 1)
    return projected.swapaxes(0, 1) if isinstance(layer, TRANSPOSED) else projected


def cut(rows, columns, side):
    return [(i, j) for i in range(0, rows, side) for j in range(0, columns, side)]


def in_matrices(weight, layer):
    """As in the paper, in each group: columns in the order (S, d, d). A transposed convolution's is the adjoint's."""
    matrices = np.split(weight.reshape(len(weight), -1), getattr(layer, "groups", 1))
    return [matrix.T for matrix in matrices] if isinstance(layer, TRANSPOSED) else matrices


def side_of(layer, tile):
    spec = spec_of(layer)
    return min(tile, spec.out_channels // spec.groups, spec.in_channels // spec.groups)


def project_tiles(weight, layer, rank, tile):
    """Every tile k x k, zeros at the edges."""
    side, results = side_of(layer, tile), []
    for matrix in in_matrices(weight, layer):
        result = np.empty_like(matrix)
        for i, j in cut(*matrix.shape, side):
            block = matrix[i : i + side, j : j + side]
            padded = np.zeros((side, side))
            padded[: block.shape[0], : block.shape[1]] = block
            result[i : i + side, j : j + side] = truncate(padded, rank)[: block.shape[0], : block.shape[1]]
        results.append(result.T if isinstance(layer, TRANSPOSED) else result)
    return np.concatenate(results).reshape(weight.shape)


def channels_per_block(inputs, channels):
    divisors = [c for c in range(1, inputs + 1) if inputs % c == 0]
    return min(divisors, key=lambda c: round(abs(math.log(c / channels)), 9))


def project_blocks(weight, layer, rank, channels):
    if isinstance(layer, TRANSPOSED):
        return project_blocks(weight.swapaxes(0, 1), None, rank, channels).swapaxes(0, 1)
    c = channels_per_block(weight.shape[1], channels)
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], c):
        block = weight[:, start : start + c]
        result[:, start : start + c] = truncate(block.reshape(len(weight), -1), rank).reshape(block.shape)
    return result


REFERENCES = [
    (SVD(), project_svd),
    (SpatialSVD(), project_spatial),
    (SeparableSVD(), project_separable),
    *[(TiledSVD(k), lambda w, layer, r, k=k: project_tiles(w, layer, r, k)) for k in (1, 3, 7, 64)],
    *[(BlockSVD(c), lambda w, layer, r, c=c: project_blocks(w, layer, r, c)) for c in (1, 3, 5, 100)],
]
CASES = [(d, f, name) for d, f in REFERENCES for name in LAYERS if supports(d, make_layer(name)[0])]


@pytest.mark.parametrize(
    ("decomposition", "reference", "name"), CASES, ids=lambda x: "" if callable(x) else str(x).replace(" ", "")
)
def test_projection(decomposition, reference, name):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        layer, _ = make_layer(name, dtype)
        spec, weight = spec_of(layer), layer.weight.detach()
        exact = weight.double().numpy()
        for rank in some_ranks(decomposition.full_rank(spec)):
            ours = decomposition.factor(weight, spec, rank).reconstruct().double().numpy()
            best = reference(exact, layer, *rank)
            slack = tolerance * np.linalg.norm(exact)
            assert np.linalg.norm(ours - exact) <= (1 + 1e-6) * np.linalg.norm(best - exact) + slack
            if dtype == torch.float64:
                assert np.linalg.norm(ours - best) <= 1e-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("tile", [1, 3, 7, 64])
@pytest.mark.parametrize("name", [name for name in LAYERS if supports(TiledSVD(), make_layer(name)[0])])
def test_tiles_store_no_zeros(name, tile):
    layer, _ = make_layer(name)
    matrices, side = in_matrices(layer.weight.detach().numpy(), layer), side_of(layer, tile)
    rows, columns = matrices[0].shape
    assert TiledSVD(tile).full_rank(spec_of(layer)) == (side,)
    for rank in range(1, side + 1):
        sizes = [(min(side, rows - i), min(side, columns - j)) for i, j in cut(rows, columns, side)]
        expected = len(matrices) * sum(min(rank, height, width) * (height + width) for height, width in sizes)
        assert TiledSVD(tile).factor(layer.weight, spec_of(layer), (rank,)).num_weights == expected


CONVOLUTION = nn.Conv2d(16, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="reflect")
UPSAMPLING = nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1, output_padding=1)
DEPLOYED = [
    (SVD(), CONVOLUTION, (7,), [
        nn.Conv2d(16, 7, (3, 5), (2, 1), (1, 2), (1, 2), padding_mode="reflect"), nn.Conv2d(7, 12, 1)
    ]),
    (SVD(), nn.Conv2d(16, 12, 3, groups=4), (2,), [
        nn.Conv2d(16, 8, 3, groups=4), nn.Conv2d(8, 12, 1, groups=4)
    ]),
    (SVD(), UPSAMPLING, (7,), [
        nn.Conv2d(16, 7, 1), nn.ConvTranspose2d(7, 12, 3, stride=2, padding=1, output_padding=1)
    ]),
    (SVD(), nn.Linear(16, 12), (7,), [nn.Linear(16, 7), nn.Linear(7, 12)]),
    (SpatialSVD(), CONVOLUTION, (7,), [
        nn.Conv2d(16, 7, (3, 1), (2, 1), (1, 0), (1, 1), padding_mode="reflect"),
        nn.Conv2d(7, 12, (1, 5), (1, 1), (0, 2), (1, 2), padding_mode="reflect"),
    ]),
    (SpatialSVD(), nn.Conv2d(16, 12, (3, 5), padding=2, groups=4), (2,), [
        nn.Conv2d(16, 8, (3, 1), padding=(2, 0), groups=4), nn.Conv2d(8, 12, (1, 5), padding=(0, 2), groups=4)
    ]),
    (SpatialSVD(), UPSAMPLING, (7,), [
        nn.ConvTranspose2d(16, 7, (3, 1), (2, 1), (1, 0), (1, 0)),
        nn.ConvTranspose2d(7, 12, (1, 3), (1, 2), (0, 1), (0, 1)),
    ]),
    (SeparableSVD(), CONVOLUTION, (7, 4), [
        nn.Conv2d(16, 7, (3, 1), (2, 1), (1, 0), (1, 1), padding_mode="reflect"),
        nn.Conv2d(7, 4, (1, 5), (1, 1), (0, 2), (1, 2), padding_mode="reflect"),
        nn.Conv2d(4, 12, 1),
    ]),
    (SeparableSVD(), UPSAMPLING, (7, 4), [
        nn.ConvTranspose2d(16, 7, (3, 1), (2, 1), (1, 0), (1, 0)),
        nn.ConvTranspose2d(7, 4, (1, 3), (1, 2), (0, 1), (0, 1)),
        nn.Conv2d(4, 12, 1),
    ]),
    (CP(), CONVOLUTION, (7,), [
        nn.Conv2d(16, 7, 1),
        nn.Conv2d(7, 7, (3, 1), (2, 1), (1, 0), (1, 1), groups=7, padding_mode="reflect"),
        nn.Conv2d(7, 7, (1, 5), (1, 1), (0, 2), (1, 2), groups=7, padding_mode="reflect"),
        nn.Conv2d(7, 12, 1),
    ]),
    (CP(), UPSAMPLING, (7,), [
        nn.Conv2d(16, 7, 1),
        nn.ConvTranspose2d(7, 7, (3, 1), (2, 1), (1, 0), (1, 0), groups=7),
        nn.ConvTranspose2d(7, 7, (1, 3), (1, 2), (0, 1), (0, 1), groups=7),
        nn.Conv2d(7, 12, 1),
    ]),
    (CP(), nn.Conv2d(16, 12, (1, 5), stride=(2, 3), padding=(1, 2), padding_mode="circular"), (7,), [
        nn.Conv2d(16, 7, 1, (2, 1), (1, 0), padding_mode="circular"),
        nn.Conv2d(7, 7, (1, 5), (1, 3), (0, 2), groups=7, padding_mode="circular"),
        nn.Conv2d(7, 12, 1),
    ]),
    (CP(), nn.Conv1d(16, 12, 5, stride=2), (7,), [
        nn.Conv1d(16, 7, 1), nn.Conv1d(7, 7, 5, stride=2, groups=7), nn.Conv1d(7, 12, 1)
    ]),
    (Tucker2(), UPSAMPLING, (7, 4), [
        nn.Conv2d(16, 7, 1), nn.ConvTranspose2d(7, 4, 3, stride=2, padding=1, output_padding=1), nn.Conv2d(4, 12, 1)
    ]),
    (Tucker2(), nn.Conv1d(16, 12, 5, stride=2), (7, 4), [
        nn.Conv1d(16, 7, 1), nn.Conv1d(7, 4, 5, stride=2), nn.Conv1d(4, 12, 1)
    ]),
    (Tucker2(), CONVOLUTION, (7, 4), [
        nn.Conv2d(16, 7, 1),
        nn.Conv2d(7, 4, (3, 5), (2, 1), (1, 2), (1, 2), padding_mode="reflect"),
        nn.Conv2d(4, 12, 1),
    ]),
    (BlockSVD(4), CONVOLUTION, (3,), [
        nn.Conv2d(16, 12, (3, 5), (2, 1), (1, 2), (1, 2), groups=4, padding_mode="reflect"), nn.Conv2d(12, 12, 1)
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("decomposition", "layer", "rank", "expected"), DEPLOYED)
def test_deployed_layers(decomposition, layer, rank, expected):
    """Ordinary layers, of which only the last one has the bias."""
    module = decomposition.factor(layer.weight, spec_of(layer), rank).to_module(layer.bias)
    assert [type(stage) for stage in module] == [type(stage) for stage in expected]
    for stage, wanted in zip(module, expected, strict=True):
        options = [{k: v for k, v in vars(x).items() if not k.startswith("_")} for x in (stage, wanted)]
        plain = [{k: tuple(v) if isinstance(v, list) else v for k, v in option.items()} for option in options]
        assert plain[0] == plain[1]
    assert [stage.bias is not None for stage in module] == [False] * (len(module) - 1) + [True]


def descend(kernel, r, steps):
    """Alternating gradient steps on `u` [S, height, r] and `v` [T, width, r], as a talk of Bulygin has them for
    Jaderberg et al. (2014): `grad_u = sum_p (W - v u^T)^T v`, `grad_v = sum_q (W - v u^T) u`. Steps of 1 / L."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs, height, width = kernel.shape
    u, v = (torch.randn(n, r, generator=generator).double().numpy() for n in (inputs * height, outputs * width))
    matrix = kernel.transpose(0, 3, 1, 2).reshape(outputs * width, inputs * height)
    for _ in range(steps):
        u += (matrix - v @ u.T).T @ v / np.linalg.norm(v.T @ v, 2)
        v += (matrix - v @ u.T) @ u / np.linalg.norm(u.T @ u, 2)
    return float(np.square(matrix - v @ u.T).sum())


@pytest.mark.parametrize("rank", [(3, 12), (9, 12), (9, 5), (13, 5), (1, 1)], ids=str)
def test_gradient_descent_reaches_no_more(rank):
    """The separable filters of the principal outputs, in closed form, are where the talk's gradients lead to."""
    layer, _ = make_layer("conv2d")
    spec, weight = spec_of(layer), layer.weight.detach()
    error = float((weight - SeparableSVD().factor(weight, spec, rank).reconstruct()).square().sum())
    left, _, _ = np.linalg.svd(weight.numpy().reshape(len(weight), -1), full_matrices=False)
    narrow = np.tensordot(left[:, : rank[1]].T, weight.numpy(), 1)
    lost = float(weight.square().sum()) - float(np.square(narrow).sum())
    reached = lost + descend(narrow, rank[0], 3000)
    assert error <= reached * (1 + 1e-12)
    assert error == pytest.approx(reached, rel=1e-2)


def test_blocks_of_linear_layers():
    """Blocks of inputs side by side, which plain `nn` has not."""
    layer = nn.Linear(24, 12)
    module = BlockSVD(8).factor(layer.weight, spec_of(layer), (5,)).to_module(layer.bias)
    assert (module[0].in_features, module[0].out_features, module[0].groups) == (24, 15, 3)
    assert (module[1].in_features, module[1].out_features) == (15, 12)


@pytest.mark.parametrize("inputs", [1, 2, 3, 7, 12, 48, 60, 64, 97, 100])
@pytest.mark.parametrize("channels", [1, 3, 8, 16])
def test_nearest_divisor(inputs, channels):
    blocks = BlockSVD(channels).blocks(spec_of(nn.Linear(inputs, 5)))
    assert inputs == blocks * channels_per_block(inputs, channels)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", None, True])
def test_bad_sizes(value):
    with pytest.raises(ValueError, match=r"`tile`.*but got"):
        TiledSVD(value)
    with pytest.raises(ValueError, match=r"`channels`.*but got"):
        BlockSVD(value)


@pytest.mark.parametrize("value", ["fast", True, 1, ""])
def test_bad_run(value):
    with pytest.raises(ValueError, match=r"`run`.*but got"):
        TiledSVD(run=value)
