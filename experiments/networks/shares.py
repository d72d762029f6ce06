"""Which share of the weights takes part by default in networks of their real size (random weights; nothing is trained).

    python experiments/networks/shares.py

Matrices and convolution kernels, embeddings and tables of positions apart.
"""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
import torchvision
import transformers
from networks import is_table
from torch import nn

from lowrank_pl import Call, make_plan
from lowrank_pl.adapters import find_maps
from lowrank_pl.tracing import record


def image(size: int = 224) -> Call:
    return Call((torch.randn(1, 3, size, size),), batch=1)


def words(**more: Any) -> Call:
    return Call(kwargs={"input_ids": torch.randint(0, 1000, (1, 16)), **more}, batch=1)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(10_000, 256), nn.LSTM(256, 512, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(1024, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.words(x))[0])


def tcn() -> nn.Module:
    norm, layers = nn.utils.parametrizations.weight_norm, []
    for i in range(8):
        layers += [norm(nn.Conv1d(32 if i == 0 else 256, 256, 3, dilation=2**i, padding=2**i)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(256, 10, 1))


MIXTRAL = {
    "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
NETWORKS = {
    "vit_b_16": lambda: (torchvision.models.vit_b_16(), image()),
    "swin_t": lambda: (torchvision.models.swin_t(), image()),
    "resnetv2_50x1_bit": lambda: (timm.create_model("resnetv2_50x1_bit"), image()),
    "beit_base_patch16_224": lambda: (timm.create_model("beit_base_patch16_224"), image()),
    "GPT-2": lambda: (transformers.GPT2LMHeadModel(transformers.GPT2Config()), words()),
    "T5 small": lambda: (
        transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0)),
        words(labels=torch.zeros(1, 4, dtype=torch.long)),
    ),
    "Mixtral, an eighth as wide, 2 layers, 1,000 words": lambda: (
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)),
        words(),
    ),
    "LSTM tagger": lambda: (Tagger(), Call((torch.randint(0, 1000, (1, 16)),), batch=1)),
    "TCN with weight norm": lambda: (tcn(), Call((torch.randn(1, 32, 64),), batch=1)),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("| network | weights | share |\n|---|---:|---:|")  # noqa: T201
    for name, make in NETWORKS.items():
        net, call = make()
        plan = make_plan(net.eval(), trace=record(net, call))
        maps = {key: each for key, each in find_maps(net).items() if not is_table(each)}
        tables = {id(each.parameters[0]) for each in find_maps(net).values() if is_table(each)}
        sizes = {key: each.layer.num_weights for key, each in maps.items() if id(each.parameters[0]) not in tables}
        taken = sum(sizes[c.name] for c in plan.compressions)
        print(f"| {name} | {sum(sizes.values()):,} | {taken / sum(sizes.values()):.1%} |", flush=True)  # noqa: T201
