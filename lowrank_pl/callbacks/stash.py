"""Training weights set aside while a module holds others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.fingerprints import fingerprints


class Stash:
    """Copies of tensors that are about to be overwritten in place.

    Everything happens outside of inference mode, in which Lightning runs validation, so that no copy becomes an
    inference tensor.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._sealed: list[tuple[int, int]] = []

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._saved]

    def seal(self) -> None:
        """Remember the tensors as they are now: after the last write that the stash is to undo."""
        self._sealed = fingerprints(tensor for tensor, _ in self._saved)

    def is_intact(self) -> bool:
        """Whether nobody has written to the tensors since `seal`."""
        return fingerprints(tensor for tensor, _ in self._saved) == self._sealed

    def restore_(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, saved in self._saved:
                tensor.detach().copy_(saved)

    def substitute(self, module: nn.Module, state_dict: dict[str, Any]) -> None:
        """Put the saved values into a state dict of `module`."""
        saved = {(tensor.data_ptr(), tensor.shape): value for tensor, value in self._saved}
        for name, tensor in module.state_dict().items():
            if name in state_dict and isinstance(tensor, Tensor):
                state_dict[name] = saved.get((tensor.data_ptr(), tensor.shape), state_dict[name])
