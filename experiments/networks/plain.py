"""Small networks of plain PyTorch, each with something that others lack: what is not a layer, shared, or normalized."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Tagger(nn.Module):
    """An embedding, a bidirectional recurrent network, a linear layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.rnn = kind(32, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.middle, self.head = nn.Linear(64, 64), nn.Linear(64, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.middle(self.rnn(self.embedding(x))[0])))


def tcn() -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(16, 32), (32, 32), (32, 32)]):
        d = 2**i
        layers += [weight_norm(nn.Conv1d(a, b, 3, padding=d, dilation=d)), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Conv1d(32, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5)
    )


def discriminator() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


class UNet3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b), nn.ReLU())  # noqa: E731
        self.down, self.bottom, self.up = block(1, 16), block(16, 32), nn.ConvTranspose3d(32, 16, 2, 2)
        self.last, self.head = block(32, 16), nn.Conv3d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = self.up(self.bottom(nn.functional.max_pool3d(high, 2)))
        return self.head(self.last(torch.cat([high, low], 1)))


def autoencoder() -> nn.Module:
    sizes = (64, 48, 16, 48, 64)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class FNO(nn.Module):
    """A Fourier neural operator (Li et al. 2021) in two dimensions: complex weights on the lowest frequencies."""

    def __init__(self, width: int = 16, modes: int = 5) -> None:
        super().__init__()
        self.modes = modes
        self.lift, self.head = nn.Conv2d(1, width, 1), nn.Conv2d(width, 1, 1)
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        shape = (width, width, modes, modes)
        self.spectral = nn.ParameterList(torch.randn(shape, dtype=torch.cfloat) / width for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, m = self.lift(x), self.modes
        for local, weight in zip(self.local, self.spectral, strict=True):
            spectrum = torch.fft.rfft2(x)
            kept = torch.einsum("nixy,ioxy->noxy", spectrum[..., :m, :m], weight)
            full = torch.zeros_like(spectrum)
            full[..., :m, :m] = kept
            x = gelu(torch.fft.irfft2(full, s=x.shape[-2:]) + local(x))
        return self.head(x)


class GraphNet(nn.Module):
    """Messages over a dense adjacency; one map is a bare parameter in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.update, self.head = nn.Linear(16, 32), nn.Linear(64, 32), nn.Linear(32, 4)
        self.relations = nn.Parameter(torch.randn(3, 32, 32) / 32)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = relu(self.into(x))
        messages = torch.einsum("nij,rcd,njc->nid", edges, self.relations, x)
        return self.head(relu(self.update(torch.cat([x, messages], -1))).mean(1))


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank update (Hu et al. 2021)."""

    def __init__(self, a: int, b: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(a, b).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, a) / a), nn.Parameter(torch.zeros(b, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + linear(linear(x, self.A), self.B)


def lora() -> nn.Module:
    return nn.Sequential(
        LoRALinear(32, 64), nn.ReLU(), LoRALinear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )


class TiedLM(nn.Module):
    """A language model whose output layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.middle = (
            nn.Embedding(64, 32),
            nn.GRU(32, 32, batch_first=True),
            nn.Linear(32, 32),
        )
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.middle(self.rnn(self.embedding(x))[0])))


class Experts(nn.Module):
    """A mixture of experts, the weights of all in one parameter, of which every token takes the best two."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.into, self.router, self.head = nn.Linear(32, 32), nn.Linear(32, experts), nn.Linear(32, 5)
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, 32, 64) / 8),
            nn.Parameter(torch.randn(experts, 64, 32) / 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        gates, chosen = self.router(x).topk(2)
        gates = torch.zeros_like(self.router(x)).scatter(-1, chosen, gates.softmax(-1))
        hidden = relu(torch.einsum("ntc,ecd->nted", x, self.up))
        return self.head(x + torch.einsum("nted,edc,nte->ntc", hidden, self.down, gates))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Siamese(nn.Module):
    """One network on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(128, 64),
        )  # fmt: skip
        self.head = nn.Linear(128, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(a), self.body(b)], 1))


class DLRM(nn.Module):
    """A recommender: embedding bags and a perceptron on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(100, 16) for _ in range(4))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.top = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        vectors = torch.stack(
            [self.bottom(x), *(bag(i[:, None]) for bag, i in zip(self.bags, ids.unbind(1), strict=True))], 1
        )
        rows, columns = torch.triu_indices(5, 5, 1)
        return self.top((vectors @ vectors.mT)[:, rows, columns])


class NeRF(nn.Module):
    """A field over points, with a skip connection: every input has many points."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(27, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(91, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.cat([x, *(f(2**i * x) for i in range(4) for f in (torch.sin, torch.cos))], -1)
        return self.second(torch.cat([self.first(waves), waves], -1))
