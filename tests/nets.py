"""Small networks, LightningModules and a training loop without Lightning, as data for the tests of callbacks."""

import contextlib
import copy

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCH = 6  # batches
SIZE = 4  # images in each


def images(batches=EPOCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * SIZE, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 4, (batches * SIZE,), generator=generator)


def loader(batches=EPOCH, seed=1):
    return DataLoader(TensorDataset(*images(batches, seed)), batch_size=SIZE)


class Net(nn.Module):
    """Two convolutions and two linear layers; `conv2` and `fc1` are the default targets."""

    def __init__(self, norm=False, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
            self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
            self.drop = nn.Dropout(dropout)
            self.fc1 = nn.Linear(48, 16)
            self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv1(x)))
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2).flatten(1)
        return self.fc2(torch.tanh(self.fc1(self.drop(x))))


TARGETS = ("conv2", "fc1")


class Broken(nn.Module):
    """Of somebody who has made a mistake."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.fc = nn.Linear(input_shape[1], num_classes)

    def forward(self, x):
        raise ZeroDivisionError("on purpose")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3)


class Module(pl.LightningModule):
    """A classifier that notes the weights of its targets in every validation and test step."""

    def __init__(self, net=None, optimizer=sgd):
        super().__init__()
        self.net = Net() if net is None else net
        self.make_optimizer = optimizer
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen.append(target_weights(self.net))
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.seen.append(target_weights(self.net))
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class StepData(Module):
    """Takes its batch from the number of optimizer steps, so that a resumed run sees what it would have seen."""

    def training_step(self, batch, batch_idx):
        x, y = images()
        i = self.trainer.global_step % EPOCH * SIZE
        return super().training_step((x[i : i + SIZE], y[i : i + SIZE]), batch_idx)


class TwoOptimizers(Module):
    """Manual optimization: every batch steps both optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        net = self.net
        one = [*net.conv1.parameters(), *net.conv2.parameters()]
        return sgd(one), sgd([*net.fc1.parameters(), *net.fc2.parameters()])


class OwnLayers(pl.LightningModule):
    """Its layers are its own, and its `training_step` does not call `forward`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def logits(self, x):
        return self.head(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.parameters())


def weights(net):
    """Copies of everything in the state, under names without what `torch.compile` adds."""
    return {name.replace("_orig_mod.", ""): t.detach().clone() for name, t in net.state_dict().items()}


def target_weights(net):
    """Copies of what is projected."""
    return {name: tensor for name, tensor in weights(net).items() if name.removesuffix(".weight") in TARGETS}


def ranks(net):
    """The rank of every target's lowered matrix."""
    return {
        name: int(torch.linalg.matrix_rank(weight.double().flatten(1), rtol=1e-5))
        for name, weight in target_weights(net).items()
    }


class Weights(pl.Callback):
    """The state after each optimizer step, as `{step: weights}`; belongs behind the callback under test."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.setdefault(trainer.global_step, weights(pl_module.net))


def quiet_trainer(root, *callbacks, **arguments):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    limits = {} if {"max_epochs", "max_steps"} & set(arguments) else {"max_epochs": 2}
    return pl.Trainer(default_root_dir=root, accelerator="cpu", callbacks=list(callbacks), **quiet | limits | arguments)


def truncate(matrix, rank):
    """The best approximation of that rank, by NumPy's SVD in double precision."""
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])


def svd(weight, rank):
    return truncate(weight.flatten(1), rank).reshape(weight.shape)


def spatial_svd(weight, rank):
    if weight.dim() == 2:
        return weight  # for convolutions only
    t, s, h, w = weight.shape
    matrix = truncate(weight.permute(0, 3, 1, 2).reshape(t * w, s * h), rank)
    return matrix.reshape(t, w, s, h).permute(0, 2, 3, 1)


def tiled_svd(weight, rank, tile=8):
    matrix = weight.flatten(1).double()
    k = min(tile, *weight.shape[:2])
    result = torch.zeros_like(matrix)
    for i in range(0, matrix.shape[0], k):
        for j in range(0, matrix.shape[1], k):
            block = matrix[i : i + k, j : j + k]
            result[i : i + k, j : j + k] = truncate(block, rank)
    return result.reshape(weight.shape)


def block_svd(weight, rank, channels=4):
    parts = [truncate(weight[:, c : c + channels].flatten(1), rank) for c in range(0, weight.shape[1], channels)]
    blocks = [p.reshape(weight.shape[0], channels, *weight.shape[2:]) for p in parts]
    return torch.cat(blocks, dim=1)


PROJECTIONS = {"svd": svd, "spatial_svd": spatial_svd, "tiled_svd": tiled_svd, "block_svd": block_svd}


def project_(net, projection, rank=2, names=TARGETS):
    with torch.no_grad():
        for name in names:
            weight = net.get_submodule(name).weight
            weight.copy_(projection(weight, rank))


def bare_loop(net, steps, due, projection, rank=2, optimizer=sgd, accumulate=1, clip=None, autocast=False):
    """Train without Lightning, projecting after each step in `due`; the state after every step, from step 1 on."""
    net = copy.deepcopy(net).train()
    x, y = images()
    optimizer, after = optimizer(net.parameters()), {}
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for step in range(1, steps + 1):
        for micro in range(accumulate):
            i = ((step - 1) * accumulate + micro) % EPOCH * SIZE
            with context:
                loss = F.cross_entropy(net(x[i : i + SIZE]), y[i : i + SIZE])
            (loss / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if step in due:
            project_(net, projection, rank)
        after[step] = weights(net)
    return after


def distance(a, b):
    """The largest difference between two states with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
