"""`torch.compile`: the same trajectory, no graphs more than without the callback, clean names."""

import pytest
import torch
from nets import EPOCH, Module, Net, Weights, distance, loader, quiet_trainer, weights
from torch._dynamo.testing import CompileCounter

from lowrank_pl import DeepTwist, ExtractStructure, FixedRank, load_compressed


def compiled(way, backend):
    module = Module(Net(norm=True))
    if way == "function":
        module.net = torch.compile(module.net, backend=backend)
    else:
        module.net.compile(backend=backend)
    return module


def fit(root, module, *callbacks):
    watch = Weights()
    quiet_trainer(root, *callbacks, watch, max_epochs=2).fit(module, loader(), loader(1))
    return watch.after


@pytest.mark.parametrize("way", ["function", "method"])
def test_same_trajectory_and_no_new_graphs(tmp_path, way):
    graphs = []
    for with_callback in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()
        module = compiled(way, counter)
        extract = ExtractStructure(tmp_path / way, submodule="net")
        callbacks = [DeepTwist(2, "svd", FixedRank(2), monitor_loss=True, recalibrate_bn=2), extract]
        after = fit(tmp_path, module, *callbacks if with_callback else [])
        graphs.append(counter.frame_count)
    assert 0 < graphs[1] <= graphs[0]
    plain = Module(Net(norm=True))
    expected = fit(tmp_path, plain, DeepTwist(2, "svd", FixedRank(2)))
    assert max(distance(after[step], expected[step]) for step in range(1, 2 * EPOCH + 1)) < 1e-5
    assert not any("_orig_mod" in name for name, _ in extract.extracted.named_modules())
    assert set(extract.extracted.lowrank_pl_record["layers"]) == {"conv2", "fc1"}
    x = torch.randn(2, 3, 8, 8)
    again = load_compressed(Net(norm=True), tmp_path / way).eval()
    with torch.no_grad():
        assert torch.allclose(again(x), extract.extracted.eval()(x))
        projected = Net(norm=True).eval()
        projected.load_state_dict(weights(module.net))
        assert torch.allclose(projected(x), again(x), atol=1e-5)


def test_the_plan_has_clean_names(tmp_path):
    torch._dynamo.reset()
    module, callback = compiled("function", "eager"), DeepTwist(2, "svd", {"net.conv2": FixedRank(2)})
    fit(tmp_path, module, callback)
    assert [c.name for c in callback.plan.compressions] == ["net.conv2"]
    assert callback.plan.dense["net.fc1"] == "no pattern in `rank` matches it"


def test_checkpoints_of_compiled_networks(tmp_path):
    torch._dynamo.reset()
    module, watch = compiled("function", "eager"), Weights()
    loop = quiet_trainer(tmp_path, DeepTwist(4, "svd", FixedRank(2)), watch, max_epochs=1)
    loop.fit(module, loader())
    loop.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("net._orig_mod.") for name in state)
    assert distance({n.removeprefix("net._orig_mod."): t for n, t in state.items()}, watch.after[EPOCH]) == 0
