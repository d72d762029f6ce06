"""Layouts that compute from their factors, or as the dense weight that these make."""

from __future__ import annotations

from abc import abstractmethod

from lowrank_pl.layers import Run
from lowrank_pl.structures.base import Layout, total_macs

NOTES = {"factors": "runs from its factors", "dense": "stored as factors, runs dense"}


class TwoForms(Layout):
    """What a `RebuildingLayer` is deployed for. `run` says how it computes; None leaves that open."""

    run: Run | None

    @property
    @abstractmethod
    def unmeasured(self) -> Run:
        """How it computes where that is open, until something has been measured."""

    @abstractmethod
    def running(self, run: Run) -> Layout:
        """The same with this `run`."""

    @property
    def macs(self) -> int | None:
        return total_macs(self.stages) if (self.run or self.unmeasured) == "factors" else self.layer.macs

    def forms(self) -> tuple[Layout, ...]:
        other: Run = "factors" if self.unmeasured == "dense" else "dense"
        return (self,) if self.run else (self.running(self.unmeasured), self.running(other))

    def of_factors(self) -> Layout:
        return self.running("factors")

    @property
    def note(self) -> str:
        return NOTES.get(self.run or "", "")
