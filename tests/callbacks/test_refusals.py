"""What cannot work is refused early, with words that help."""

import pytest
import torch
from nets import Module, Net, distance, loader, quiet_trainer, ranks, weights
from pytorch_lightning.strategies import FSDPStrategy, SingleDeviceStrategy

from lowrank_pl import CostBudget, DeepTwist, ExtractStructure, FixedRank, LearningCompression, Targets


@pytest.mark.parametrize("S_D", [0, -3, True, 2.0, "200", None])
def test_S_D(S_D):
    with pytest.raises(ValueError, match=f"S_D.*{S_D}"):
        DeepTwist(S_D)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"'svg'.*block_svd.*spatial_svd.*\bsvd.*tiled_svd.*tucker2"):
        DeepTwist(method="svg")
    with pytest.raises(ValueError, match=r"'half'.*compression_ratio.*energy_threshold"):
        DeepTwist(rank="half")


def test_names_of_what_needs_arguments():
    with pytest.raises(ValueError, match=r"FixedRank\(\.\.\.\)"):
        DeepTwist(rank="fixed_rank")


@pytest.mark.parametrize("rank", [8, 0.5, (8,)])
def test_numbers_are_no_rank_rules(rank):
    with pytest.raises(TypeError, match="FixedRank"):
        DeepTwist(rank=rank)


@pytest.mark.parametrize("method", [8, None, torch.linalg.svd, FixedRank(2)])
def test_other_things_are_no_methods(method):
    with pytest.raises(TypeError, match=r"`method`.*TiledSVD"):
        DeepTwist(method=method)


@pytest.mark.parametrize("argument", ["method", "rank"])
def test_empty_mappings(argument):
    with pytest.raises(ValueError, match=argument):
        DeepTwist(**{argument: {}})


@pytest.mark.parametrize("targets", ["*", ["net.*"], {"include": "*"}, Targets])
def test_targets(targets):
    with pytest.raises(TypeError, match="targets"):
        DeepTwist(targets=targets)


@pytest.mark.parametrize("batches", [-1, True, 1.5, None])
def test_recalibrate_bn(batches):
    with pytest.raises(ValueError, match=f"recalibrate_bn.*{batches}"):
        DeepTwist(recalibrate_bn=batches)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_half_precision(tmp_path, precision):
    module = Module()
    with pytest.raises(ValueError, match=f"{precision.split('-')[0]}-mixed"):
        quiet_trainer(tmp_path, DeepTwist(2), precision=precision).fit(module, loader())


def test_half_weights_under_another_name(tmp_path):
    """A module that was cast by hand."""

    class Half(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].bfloat16(), batch[1]], batch_idx)

    module = Half(Net().bfloat16())
    with pytest.raises(TypeError, match=r"conv2.*float32.*bfloat16"):
        quiet_trainer(tmp_path, DeepTwist(2), max_steps=3).fit(module, loader())


def test_sharded_strategies(tmp_path):
    """Without a second device: the trainer is asked what it would be."""
    loop = quiet_trainer(tmp_path)
    assert isinstance(loop.strategy, SingleDeviceStrategy)

    class Pretended:
        strategy, precision = FSDPStrategy.__new__(FSDPStrategy), "32-true"

    with pytest.raises(ValueError, match=r"FSDPStrategy.*strategy='ddp'"):
        DeepTwist(2).setup(Pretended(), Module(), "fit")


def test_all_layers_stay_dense(tmp_path, recwarn):
    """Layers match, and none would get cheaper: training is as if there were no callback, and a warning says so."""
    module, extract = Module(), ExtractStructure()
    loop = quiet_trainer(tmp_path, DeepTwist(2, "svd", FixedRank(1000)), extract, max_steps=4)
    loop.fit(module, loader())
    assert max(ranks(module.net).values()) > 10
    assert distance(weights(extract.extracted), weights(module)) == 0
    assert any("stay dense" in str(warning.message) for warning in recwarn)


def test_two_methods_in_one_fit(tmp_path):
    both = DeepTwist(), LearningCompression(budget=CostBudget("params", 0.5), l_step_epochs=1)
    with pytest.raises(ValueError, match=r"one compressing callback .* DeepTwist and LearningCompression"):
        quiet_trainer(tmp_path, *both, max_epochs=1).fit(Module(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": {"zz*": "cp"}}, r"Pattern 'zz\*' in `method`"),
        ({"rank": {"zz*": FixedRank(2)}}, r"Pattern 'zz\*' in `rank`"),
        ({"method": "low_rank_plus_sparse", "rank": FixedRank((1, 2, 3))}, r"`r` with 2 entries"),
    ],
    ids=["method", "rank", "entries"],
)
def test_choices_that_cannot_be_are_told_before_a_step(tmp_path, arguments, message):
    module = Module()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, DeepTwist(2, **arguments), max_steps=3).fit(module, loader())
    after = weights(module)
    assert all(torch.equal(after[name], before[name]) for name in before)
