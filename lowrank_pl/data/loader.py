"""A loader that can be taken up in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose state is how many batches of the epoch it has handed out.

    Its sampler has an attribute `first_batch`, where the next epoch starts.
    """

    _served = 0
    _pending = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: nothing happens before the first batch, and a state is often loaded after Lightning has made
        # the iterator
        self._served, self._pending = self._pending, 0
        self.sampler.first_batch = self._served  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Plain numbers; at the end of an epoch the next one's beginning."""
        return {"batches": self._served if self._served < len(self) else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """For the epoch that is started next."""
        self._pending = state["batches"]
