"""The order of the images: by seed and epoch, shared out, and renewed by Lightning."""

from itertools import chain

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lowrank_pl.data import EpochSampler


def epoch(sampler, number=0):
    sampler.set_epoch(number)
    return torch.cat(list(sampler)).tolist()


@pytest.mark.parametrize("size", [1, 63, 64, 65])
def test_batches(size):
    sampler = EpochSampler(size, batch_size=16)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert [len(batch) for batch in batches[:-1]] == [16] * (len(batches) - 1)
    assert sorted(torch.cat(batches).tolist()) == list(range(size))


def test_order_follows_seed_and_epoch():
    orders = [epoch(EpochSampler(50, 8, seed=seed), number) for seed in range(4) for number in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert epoch(EpochSampler(50, 8, seed=2), 3) == orders[2 * 4 + 3]


def test_order_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    epoch(EpochSampler(50, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_shuffling():
    assert epoch(EpochSampler(10, 3, shuffle=False), 5) == list(range(10))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_are_disjoint_and_cover(shuffle):
    shares = [epoch(EpochSampler(60, 8, shuffle, rank=rank, world_size=3), 1) for rank in range(3)]
    assert sorted(chain(*shares)) == list(range(60))
    assert [len(share) for share in shares] == [20, 20, 20]


@pytest.mark.parametrize("size", [2, 61, 62])
def test_shares_of_an_odd_number(size):
    samplers = [EpochSampler(size, 8, rank=rank, world_size=3) for rank in range(3)]
    shares = [epoch(sampler) for sampler in samplers]
    assert set(chain(*shares)) == set(range(size))
    assert len({len(share) for share in shares}) == len({len(sampler) for sampler in samplers}) == 1


def test_share_of_this_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert epoch(EpochSampler(60, 8)) == epoch(EpochSampler(60, 8, rank=1, world_size=3))
    # the type that Lightning leaves in place, where it would share out the others a second time
    assert isinstance(EpochSampler(60, 8), DistributedSampler)


def test_bad_arguments():
    with pytest.raises(ValueError, match="1 or more, got 0 and 4"):
        EpochSampler(0, 4)
    with pytest.raises(ValueError, match="come together, got 1 and None"):
        EpochSampler(10, 4, rank=1)
    with pytest.raises(ValueError, match="rank"):
        EpochSampler(10, 4, rank=2, world_size=2)


class Indices(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, indices):
        return indices


class Recorder(pl.LightningModule):
    """Keeps the indices of every training batch; saves a checkpoint when an epoch has ended."""

    def __init__(self):
        super().__init__()
        self.layer, self.epochs = nn.Linear(1, 1), {}

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).extend(batch.tolist())
        return self.layer(batch[:, None].float()).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(root, epochs, **kwargs):
    module = Recorder()
    trainer = pl.Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Indices(), sampler=EpochSampler(20, 6, seed=1), batch_size=None)
    trainer.fit(module, loader, **kwargs)
    assert trainer.train_dataloader is loader  # nothing of it was replaced
    return module.epochs


def test_lightning_renews_the_order(tmp_path):
    epochs = fit(tmp_path, 3)
    assert epochs == {number: epoch(EpochSampler(20, 6, seed=1), number) for number in range(3)}


def test_lightning_resumes_with_the_right_epoch(tmp_path):
    straight = fit(tmp_path / "straight", 4)
    fit(tmp_path, 2)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    resumed = fit(tmp_path, 4, ckpt_path=checkpoint)
    assert resumed == {number: straight[number] for number in (2, 3)}
