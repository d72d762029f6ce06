"""Batches of images against plain arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from lowrank_pl.data import ImageSet
from lowrank_pl.data.image_set import as_images, channel_statistics, mean_image


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randint(0, 256, (30, 3, 8, 6), dtype=torch.uint8)


def test_batch(images):
    mean, std = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.1
    x, y = ImageSet(images, torch.arange(30), mean, std)[[4, 2, 9]]
    expected = (images[[4, 2, 9]].double() / 255 - mean.double()) / std.double()
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)
    assert y.tolist() == [4, 2, 9]
    assert x.is_contiguous()


def test_padding_is_black(images):
    """Zero before the normalization, as torchvision pads."""
    black = (torch.zeros(3, 1, 1) - 0.4) / 0.5
    x, _ = ImageSet(images, torch.arange(30), torch.tensor(0.4), torch.tensor(0.5), augment=True)[range(30)]
    assert ((x - black).abs() < 1e-3).float().mean() > 0.2


def test_one_index_is_refused(images):
    with pytest.raises(TypeError, match=r"got 3: .*EpochSampler"):
        ImageSet(images, torch.arange(30), torch.zeros(1), torch.ones(1))[3]


def test_statistics(images):
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)).float()[:, None, None])
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0).float()[:, None, None])
    torch.testing.assert_close(mean_image(images), pixels.mean(0).float())


def test_a_constant_channel_stays_finite():
    assert channel_statistics(torch.full((5, 1, 4, 4), 7, dtype=torch.uint8))[1].min() > 0


def test_layouts():
    color, gray = torch.randint(0, 256, (4, 8, 6, 3)).byte(), torch.randint(0, 256, (4, 8, 6)).byte()
    assert torch.equal(as_images(color)[1, 2], color[1, :, :, 2])
    assert torch.equal(as_images(gray)[:, 0], gray)


def test_resizing():
    gray = torch.randint(0, 256, (4, 8, 8)).byte()
    larger = as_images(gray, 32)
    expected = F.interpolate(gray[:, None].double(), (32, 32), mode="bilinear", align_corners=False)
    assert larger.shape == (4, 1, 32, 32)
    assert larger.dtype == torch.uint8
    assert (larger.double() - expected).abs().max() <= 0.5 + 1e-3
    assert torch.equal(as_images(gray, 8), as_images(gray))
