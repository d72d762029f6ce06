"""What a decomposition is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lowrank_pl.decompositions.structure import Rank, Structure
from lowrank_pl.layer_spec import LayerSpec


class Decomposition(ABC):
    """A family of cheaper structures for a weight, indexed by a rank.

    Final subclasses are frozen dataclasses whose fields are the configuration. Weights come as PyTorch stores them.
    """

    @abstractmethod
    def unsupported(self, layer: LayerSpec) -> str | None:
        """Why this layer cannot be decomposed so; None if it can."""

    @abstractmethod
    def full_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank, at which the projection changes nothing. The smallest is all ones."""

    @abstractmethod
    def stages(self, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
        """The linear maps that will be deployed, in integers: parameters and MACs follow from them."""

    @abstractmethod
    def spectra(self, weight: Tensor, layer: LayerSpec) -> tuple[Tensor, ...]:
        """Per entry of the rank, the squared error that truncation costs: float64 `[full + 1]`, from rank 0 on.

        Where the rank has several entries, the sum over them bounds the squared error of the projection from above.
        """

    def factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Structure:
        """The projection of the weight, as factors in the weight's own type.

        Raises `ValueError` for a rank outside [1, full] and for weights that are not finite.
        """
        full = self.full_rank(layer)
        if len(rank) != len(full) or not all(1 <= r <= most for r, most in zip(rank, full, strict=True)):
            raise ValueError(f"Expected a rank from {(1,) * len(full)} to {full} but got {rank}")
        return self._factor(weight.detach(), layer, rank)

    @abstractmethod
    def _factor(self, weight: Tensor, layer: LayerSpec, rank: Rank) -> Structure:
        """`factor`, for a rank that has been checked."""
