"""What a database knows of its workers: who listens, who has rows in hand, who came to an end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import catalog, system
from sbert_pg.catalog import tables
from sbert_pg.catalog.binding import installed
from sbert_pg.freshness.database import LISTENS_AS
from sbert_pg.freshness.status import ColumnStatus

_claim, _session = tables.claim.c, system.ACTIVITY.c


@dataclass(frozen=True, slots=True)
class Lease:
    """Rows that one worker has in hand.

    Attributes:
        worker: its name.
        rows: how many rows.
        left: seconds until others may take them; below zero the worker came to an end, as it renews
            its leases, and no other has taken over.
    """

    worker: str
    rows: int
    left: float


@dataclass(frozen=True, slots=True)
class SeenWorkers:
    """The workers of a database.

    Attributes:
        listening: names of those that wait for notifications, cut to 47 characters. Those that poll
            (behind a pooler, or ``--once``) are seen by their leases alone.
        leases: by column, as ``ColumnStatus`` names it.
    """

    listening: tuple[str, ...]
    leases: dict[str, list[Lease]]

    def of(self, column: ColumnStatus) -> str:
        """Who works on a column, and when a worker was last done with it."""
        parts = [*self._at_work(self.leases.get(column.column, ()))]
        last = "never" if column.age is None else f"{column.age:,.0f} s ago"
        return "; ".join([*parts, f"caught up {last}"])

    def _at_work(self, leases: Sequence[Lease]) -> Iterator[str]:
        for name in sorted({lease.worker for lease in leases}):
            own = [lease for lease in leases if lease.worker == name]
            rows, left = sum(lease.rows for lease in own), max(lease.left for lease in own)
            if left >= 0:
                yield f"{name} has {rows:,} rows in hand"
            else:
                yield f"{name} came to an end with {rows:,}; its lease did {-left:,.0f} s ago"

    def __str__(self) -> str:
        if not self.listening:
            return "No worker listens"
        return f"{len(self.listening)} listening: {', '.join(self.listening)}"


def seen_workers(connection: Connection) -> SeenWorkers:
    """The workers that a database sees, none without a catalog; it only reads.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    if not installed(connection):
        return SeenWorkers((), {})
    listening = sa.select(_session.application_name).where(
        _session.datname == sa.func.current_database(),
        _session.application_name.startswith(LISTENS_AS, autoescape=True),
    )
    names = sorted(name.removeprefix(LISTENS_AS) for name in connection.scalars(listening))
    left = sa.extract("epoch", _claim.until - sa.func.clock_timestamp())
    held = sa.select(_claim.binding_id, _claim.worker, sa.func.cardinality(_claim["keys"]), left)
    columns = {binding.id: str(binding) for binding in catalog.all_bindings(connection)}
    leases: dict[str, list[Lease]] = {}
    for binding, token, rows, seconds in connection.execute(held):
        if binding in columns:
            lease = Lease(token.rpartition("/")[0], rows, float(seconds))
            leases.setdefault(columns[binding], []).append(lease)
    return SeenWorkers(tuple(names), leases)
