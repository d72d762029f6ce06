"""How many inputs a call holds, and the same call with fewer or more of them."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lowrank_pl import Call, summarize
from lowrank_pl.tracing import with_inputs


class Stacks(nn.Module):
    """As detectors, which take a list of images and a list of what is on them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, images, targets=None):
        return self.second(self.first(torch.stack(images)))


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_lists_of_samples_are_cut(batch):
    images = [torch.randn(3, 8, 8) for _ in range(batch)]
    call = Call((images, [{"boxes": torch.randn(5, 4)} for _ in range(batch)]), batch=batch)
    for count in (1, 2, 9):
        small = with_inputs(call, batch, count)
        assert [len(part) for part in small.args] == [count, count]
        assert torch.equal(small.args[0][-1], images[(count - 1) % batch])
    net = Stacks()
    assert summarize(net, net, call, latency=False).dense.macs == 27 * 8 * 36 + 72 * 8 * 16


def test_lists_of_batches_are_no_samples():
    features = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    small = with_inputs(Call((features,), batch=2), 2, 1)
    assert [x.shape for x in small.args[0]] == [(1, 3, 8, 8), (1, 3, 4, 4)]


def test_the_axis_that_all_tensors_have():
    """A sequence that happens to be as long as the batch is large."""
    small = with_inputs(Call((torch.randn(12, 8, 32), torch.randn(8, 8, 32)), batch=8), 8, 1)
    assert [x.shape for x in small.args] == [(12, 1, 32), (8, 1, 32)]
    small = with_inputs(Call((torch.randn(8, 12, 32), torch.randn(8, 8, 32)), {"table": torch.randn(5)}, batch=8), 8, 1)
    assert [x.shape for x in small.args] == [(1, 12, 32), (1, 8, 32)]


@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences_are_cut(is_sorted):
    """The first input has all nine steps, the others fewer."""
    lengths = torch.tensor([9, 6, 3] if is_sorted else [9, 3, 6])
    packed = pack_padded_sequence(torch.randn(3, 9, 8), lengths, batch_first=True, enforce_sorted=is_sorted)
    net = nn.LSTM(8, 16, batch_first=True)
    state = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    report = summarize(net, net, Call((packed, state), batch=3), latency=False)
    assert report.dense.macs == 9 * (8 + 16) * 64
    assert sum(layer.dense.macs for layer in report.layers) == 6 * (8 + 16) * 64  # on average
