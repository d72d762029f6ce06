"""How the linear maps inside of a module are read, written and deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lowrank_pl.layer_spec import LayerSpec
from lowrank_pl.layers import build


class Adapter(ABC):
    """Knows one kind of module: which linear maps it holds, by keys, and how to get at them.

    The key of a module that is one linear map itself is `""`. A map's name is that of its module, a dot and its key,
    and it is the name of what is deployed in its place, too. Weights are given and taken as PyTorch stores those of the
    layer that `maps` says, `[T, S]` for linear ones. `read` and `write_` undo each other; whatever a method does to a
    weight it does through these.
    """

    # whether only a run can tell if what `maps` finds is multiplied by
    shown_by_running = False
    # whether code that reads the parameter sees the weight as it is, and may multiply by it
    shows_weight = False
    # whether what is deployed has something else in the parameters' places, so that nobody may read them
    hides_parameters = False

    @abstractmethod
    def maps(self, module: nn.Module) -> dict[str, LayerSpec]:
        """The shapes of the linear maps in a module; empty for a module of another kind."""

    @abstractmethod
    def read(self, module: nn.Module, key: str) -> Tensor:
        """The weight, as it is used; differentiable where gradients are on."""

    def write_(self, module: nn.Module, key: str, weight: Tensor) -> None:
        """Put another weight in its place, in memory that stays the same: that of what `read` gives, where this is a
        view of the parameters. Called without gradients."""
        self.read(module, key).detach().copy_(weight)

    @abstractmethod
    def parameters(self, module: nn.Module, key: str) -> tuple[Tensor, ...]:
        """The parameters that `write_` writes to."""

    def bias(self, module: nn.Module, key: str) -> Tensor | None:
        """What is added to the map's outputs, `[T]`."""
        return None

    @abstractmethod
    def deploy(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        """What takes the module's place, or the module itself, changed: with `parts` for some of its maps, each a
        module of factors with its bias."""

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """What each map is applied to when the module is called with these arguments, or, where `stands_in`, tensors of
        that shape to check and time factors with; without those that nobody knows. None for a call that the deployed
        module could not answer."""
        return {}

    def stands_in(self, module: nn.Module, key: str) -> bool:
        """Whether `inputs` has other values in the place of those that the map is applied to, which nobody sees."""
        return False

    def inside(self, module: nn.Module) -> Sequence[nn.Module]:
        """Submodules whose weights are among the maps."""
        return ()

    def is_exact(self, module: nn.Module, key: str) -> bool:
        """Whether the parameters make the weight that is used, as far as `write_` has to do with it."""
        return True

    def obstacle(self, module: nn.Module, key: str) -> str | None:
        """Why the map can be neither projected nor replaced; None if it can."""
        return None


@final
@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map of a network: a linear layer, a convolution, or one that an adapter finds in a module."""

    name: str
    adapter: Adapter
    module: nn.Module
    key: str
    layer: LayerSpec

    @property
    def is_layer(self) -> bool:
        """Whether the module is nothing else than this map."""
        return self.key == ""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What `write_` writes to."""
        return self.adapter.parameters(self.module, self.key)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.module, self.key)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the module's classes."""
        return tuple(kind.__name__ for kind in type(self.module).__mro__)

    def read(self) -> Tensor:
        """The whole weight, for computing without a graph; nobody may write to it."""
        with torch.no_grad():
            return self.adapter.read(self.module, self.key).detach()

    @torch.no_grad()
    def write_(self, weight: Tensor) -> None:
        """Put another weight in its place, in memory that stays the same."""
        self.adapter.write_(self.module, self.key, weight)

    def add_gradient_(self, gradient: Tensor) -> None:
        """Add a gradient by the weight to those of the parameters that make it."""
        parameters = [p for p in self.parameters if p.requires_grad]
        with torch.enable_grad():
            weight = self.adapter.read(self.module, self.key)
        for p, g in zip(parameters, torch.autograd.grad(weight, parameters, gradient), strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.add_(g)

    def as_layer(self) -> nn.Module:
        """The same map as an ordinary layer of its own, in evaluation mode."""
        weight, bias = self.read(), self.bias
        with torch.device("meta"):
            layer = build(self.layer, bias is not None)
        layer.weight = nn.Parameter(weight.reshape(self.layer.stored_shape).clone(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer.eval()

    def obstacle(self) -> str | None:
        """Why it can be neither projected nor replaced, whatever the decomposition."""
        return self.adapter.obstacle(self.module, self.key)
