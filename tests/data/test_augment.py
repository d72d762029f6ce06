"""Flips and crops of a batch against one image at a time."""

import torch

from lowrank_pl.data.augment import crop, flip, flip_and_crop


def images(n=40):
    return torch.randint(1, 256, (n, 3, 8, 6), dtype=torch.uint8)


def padded_and_cut(image, top, left, padding):
    channels, height, width = image.shape
    canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    canvas[:, padding : padding + height, padding : padding + width] = image
    return canvas[:, top : top + height, left : left + width]


def test_crop_image_by_image():
    x, (top, left) = images(81), torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    for i, cropped in enumerate(crop(x, top, left, padding=4)):
        assert torch.equal(cropped, padded_and_cut(x[i], top[i], left[i], 4))


def test_flip_image_by_image():
    x, which = images(), torch.rand(40) < 0.5
    for i, flipped in enumerate(flip(x, which)):
        assert torch.equal(flipped, x[i].flip(-1) if which[i] else x[i])


def test_draws_every_crop_and_flips_half():
    torch.manual_seed(0)
    x = images(1).expand(8000, -1, -1, -1)
    augmented = flip_and_crop(x)
    seen = torch.zeros(2, 9, 9)
    for flipped in (0, 1):
        image = x[0].flip(-1) if flipped else x[0]
        for top in range(9):
            for left in range(9):
                expected = padded_and_cut(image, top, left, 4)
                seen[flipped, top, left] = (augmented == expected).flatten(1).all(1).sum()
    assert seen.sum() == 8000
    assert seen.min() > 20  # 49 expected
    assert abs(seen[0].sum() / 8000 - 0.5) < 0.03


def test_repeats_with_the_global_random_state():
    x, state = images(), torch.get_rng_state()
    first, second = flip_and_crop(x), flip_and_crop(x)
    torch.set_rng_state(state)
    assert torch.equal(flip_and_crop(x), first)
    assert not torch.equal(first, second)
