"""Rows that a layer's matrices are applied to, against the layer's own forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, make_layer
from torch import nn

from lowrank_pl.layers import lowered, lowered_inputs, lowered_outputs, spec_of

TRANSPOSED = [name for name in LAYERS if "transposed" in name]
PLAIN = [name for name in LAYERS if "transposed" not in name]
SPATIAL = [name for name in PLAIN if "linear" not in name]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(y, spec):
    """A layer's output `[N, T, *size]`, or `[..., T]`, as `[groups, n, T / groups]`."""
    y = y.reshape(-1, y.shape[-1]) if spec.kind == "linear" else y.flatten(2).transpose(1, 2).flatten(0, 1)
    return y.unflatten(1, (spec.groups, -1)).transpose(0, 1)


def multiplied(layer, x, places=None, seed=0):
    spec = spec_of(layer)
    rows = lowered_inputs(x, spec, places, generator(seed))
    y = rows @ lowered(layer.weight, spec).mT
    return y if layer.bias is None else y + layer.bias.view(spec.groups, 1, -1)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_rows_by_the_weight_are_the_outputs(name):
    layer, x = make_layer(name)
    found, y = multiplied(layer, x), rows_of(layer(x), spec_of(layer))
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lowered_outputs(layer(x), spec_of(layer), None, generator()), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", TRANSPOSED)
@torch.no_grad()
def test_patches_of_a_transposed_convolution(name):
    """`y = fold(W^T x)`: against the gradient of the convolution whose adjoint it is, patch by patch."""
    layer, x = make_layer(name)
    layer.bias, spec = None, spec_of(layer)
    patches = lowered_inputs(x, spec, None, generator()) @ lowered(layer.weight, spec).mT  # [groups, n, T / groups * k]
    size = layer(x).shape
    axes, taps = len(spec.kernel), math.prod(spec.kernel)
    patches = patches.unflatten(1, (x.shape[0], *x.shape[2:])).unflatten(-1, (-1, taps))
    room = [(n - 1) * s + d * (k - 1) + 1 + more for n, s, d, k, more in
            zip(x.shape[2:], spec.stride, spec.dilation, spec.kernel, spec.output_padding, strict=True)]  # fmt: skip
    full = torch.zeros(x.shape[0], spec.out_channels, *room, dtype=x.dtype)
    for tap in range(taps):
        offsets = torch.unravel_index(torch.tensor(tap), tuple(spec.kernel))
        part = patches[..., tap].movedim(-1, 2).movedim(0, 1).flatten(1, 2)
        where = tuple(
            slice(int(o) * d, int(o) * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offsets, spec.dilation, x.shape[2:], spec.stride, strict=True)
        )
        full[(slice(None), slice(None), *where)] += part
    inner = tuple(slice(p, p + n) for p, n in zip(spec.padding, size[2:], strict=True))
    torch.testing.assert_close(full[(slice(None), slice(None), *inner)], layer(x), rtol=1e-12, atol=1e-12)
    assert axes == x.dim() - 2


@pytest.mark.parametrize("name", SPATIAL)
@torch.no_grad()
def test_some_places(name):
    """A subset of the rows: the same places in all images, the same for the same seed, others for another one."""
    layer, x = make_layer(name)
    spec = spec_of(layer)
    every = lowered_inputs(x, spec, None, generator()).unflatten(1, (x.shape[0], -1))
    count = every.shape[2]
    state = torch.get_rng_state()
    some = lowered_inputs(x, spec, 3, generator(5)).unflatten(1, (x.shape[0], -1))
    assert torch.equal(torch.get_rng_state(), state)
    assert some.shape[2] == min(3, count)
    matches = [[i for i in range(count) if torch.equal(some[:, :, j], every[:, :, i])] for j in range(some.shape[2])]
    assert all(matches)
    assert torch.equal(some, lowered_inputs(x, spec, 3, generator(5)).unflatten(1, (x.shape[0], -1)))
    draws = {lowered_inputs(x, spec, 3, generator(s)).sum().item() for s in range(9)}
    assert len(draws) > 1 or count <= 3
    # rows of outputs at the same seed belong to them
    y = lowered_outputs(layer(x), spec, 3, generator(5))
    torch.testing.assert_close(multiplied(layer, x, 3, seed=5), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_one_input_without_a_batch_axis(name):
    layer, x = make_layer(name)
    spec = spec_of(layer)
    one, batch = (lowered_inputs(each, spec, None, generator()) for each in (x[0], x[:1]))
    assert torch.equal(one, batch)


@torch.no_grad()
def test_sequences_give_some_places_and_vectors_all():
    layer = nn.Linear(4, 3)
    spec = spec_of(layer)
    assert lowered_inputs(torch.randn(100, 4), spec, 10, generator()).shape == (1, 100, 4)
    x = torch.randn(5, 6, 7, 4)
    rows = lowered_inputs(x, spec, 10, generator()).view(5, 10, 4)
    places = {tuple(int(i) for i in (x.flatten(1, 2)[n][:, None] == rows[n]).all(-1).nonzero()[:, 0]) for n in range(5)}
    assert len(places) == 1
    assert len(next(iter(places))) == 10


@torch.no_grad()
def test_channels_last_and_views():
    layer, x = make_layer("conv2d_grouped")
    spec = spec_of(layer)
    expected = lowered_inputs(x, spec, 4, generator())
    assert torch.equal(lowered_inputs(x.to(memory_format=torch.channels_last), spec, 4, generator()), expected)
    wide = F.pad(x, (2, 1, 3, 0))[:, :, 3:, 2:-1]
    assert torch.equal(lowered_inputs(wide, spec, 4, generator()), expected)
    assert torch.equal(x, make_layer("conv2d_grouped")[1])
