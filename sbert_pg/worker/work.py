"""What the parts of a worker pass around."""

from __future__ import annotations

from dataclasses import dataclass

from sbert_pg.pending.claims import Claimed
from sbert_pg.worker.serving import Served


@dataclass(frozen=True, slots=True)
class Work:
    """A batch on its way through the worker."""

    served: Served
    claimed: Claimed


__all__ = ["Work"]
