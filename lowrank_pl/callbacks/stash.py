"""Training weights set aside while a module holds others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor has been written to: two equal lists mean that nobody wrote in between."""
    return [tensor._version for tensor in tensors]


class Stash:
    """Copies of tensors that are about to be overwritten in place.

    Everything happens outside of inference mode, in which Lightning runs validation, so that no copy becomes an
    inference tensor and every write is counted in the tensors' versions.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._versions: list[int] = []

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._saved]

    def seal(self) -> None:
        """Remember the tensors as they are now: after the last write that the stash is to undo."""
        self._versions = versions(tensor for tensor, _ in self._saved)

    def is_intact(self) -> bool:
        """Whether nobody has written to the tensors since `seal`."""
        return versions(tensor for tensor, _ in self._saved) == self._versions

    def restore_(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, saved in self._saved:
                tensor.detach().copy_(saved)

    def substitute(self, module: nn.Module, state_dict: dict[str, Any]) -> None:
        """Put the saved values into a state dict of `module`."""
        saved = {id(tensor): value for tensor, value in self._saved}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in saved and name in state_dict:
                state_dict[name] = saved[id(tensor)]
