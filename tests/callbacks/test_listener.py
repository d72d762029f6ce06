"""What is heard of the first batch, and when listening goes on."""

import torch
from nets import Net, images

from lowrank_pl.callbacks.listener import Listener
from lowrank_pl.tracing import Trace

X = images(1)[0]
LAYERS = {"conv1", "conv2", "fc1", "fc2"}


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_it_listens_until_something_runs_and_then_no_more():
    net, listener = Net(), Listener()
    assert not listener.stop(net)
    for _ in range(2):
        listener.start(net, X)
        assert not listener.stop(net)  # nothing has run
        assert listener.trace is None
        assert listener.state_dict() is None
    listener.start(net, X)
    listener.start(net, X)  # once is enough
    net(images(1)[0])
    assert listener.stop(net)
    assert set(listener.trace.calls) == set(listener.trace.samples) == LAYERS
    trace = listener.trace
    listener.start(net, X)
    assert hooks(net) == 0
    assert not listener.stop(net)
    assert listener.trace is trace


def test_giving_up_in_the_middle_of_a_batch():
    net, listener = Net(), Listener()
    listener.start(net, X)
    net.conv1(images(1)[0])
    listener.give_up()
    listener.give_up()
    assert hooks(net) == 0
    assert type(net.fc1._parameters) is dict
    assert listener.trace is None
    assert not listener.stop(net)


def test_what_a_checkpoint_kept_holds_until_the_next_batch_is_heard():
    """It has no samples, on which an extracted layer is verified."""
    net, first, listener = Net(), Listener(), Listener()
    first.start(net, X)
    net(images(1)[0])
    first.stop(net)
    listener.load_state_dict(first.state_dict())
    kept = listener.trace
    assert isinstance(kept, Trace)
    assert kept.calls == first.trace.calls
    assert kept.samples == {}
    listener.start(net, X)
    assert not listener.stop(net)  # a batch that was skipped
    assert listener.trace is kept
    listener.start(net, X)
    x = torch.cat([images(1)[0]] * 2)
    net(x)
    assert listener.stop(net)
    assert set(listener.trace.samples) == LAYERS
    assert listener.trace.batch == 4  # counts are those that the run began with
    listener.load_state_dict(None)
    assert listener.trace is None
