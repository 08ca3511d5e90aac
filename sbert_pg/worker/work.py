"""Small things that the parts of a worker pass around."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sbert_pg.pending.claims import Claimed
from sbert_pg.worker.serving import Served


@dataclass(frozen=True, slots=True)
class Work:
    """A batch on its way through the worker."""

    served: Served
    claimed: Claimed


class Pause:
    """Waits that double from try to try, and differ a little from worker to worker.

    Args:
        first: the first wait, in seconds.
        longest: the longest, in seconds.
    """

    def __init__(self, first: float = 0.1, longest: float = 30.0) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """The wait to take now."""
        wait = self._next
        self._next = min(self._next * 2, self._longest)
        return wait * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """Begin with the first again."""
        self._next = self._first


__all__ = ["Pause", "Work"]
