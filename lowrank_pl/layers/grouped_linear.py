"""A linear layer whose inputs and outputs fall into groups, as in a grouped convolution."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """`[..., S]` to `[..., T]` by a weight `[T, S / groups]`."""
    if groups == 1:
        return F.linear(x, weight, bias)
    x = x.unsqueeze(0)  # for a single vector, too, an axis to unflatten
    vectors = x.reshape(-1, groups, weight.shape[1]).transpose(0, 1)
    y: Tensor = torch.bmm(vectors, weight.unflatten(0, (groups, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)
    y = y.unflatten(0, x.shape[:-1]).squeeze(0)
    return y if bias is None else y + bias.to(y.dtype)  # under autocast, as nn.Linear


class GroupedLinear(nn.Module):
    """`groups` independent linear maps side by side: `[..., S]` to `[..., T]`, weight `[T, S / groups]`.

    Plain `nn` has it only as a `1 x 1` convolution, which wants the channels in second place.
    """

    def __init__(self, in_features: int, out_features: int, groups: int, bias: bool = True) -> None:
        super().__init__()
        if in_features % groups or out_features % groups:
            raise ValueError(f"Expected groups={groups} to divide {in_features} inputs and {out_features} outputs")
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        for parameter in self.parameters():
            bound = math.sqrt(groups / in_features)
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return grouped_linear(x, self.weight, self.bias, self.groups)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, bias={self.bias is not None}"
