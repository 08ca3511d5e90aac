"""What holds a backfill back: a rate, and replicas that fall behind."""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.errors import CatalogError
from sbert_pg.freshness.database import Database

#: Seconds between looks at the replicas.
_INTERVAL = 1.0


class Throttle:
    """Asked by the thread that claims, before it claims rows of a backfill.

    Args:
        rows_per_second: most rows a second, in bursts of at most one second's worth; ``None`` for
            no limit.
        max_replica_lag: seconds that the slowest replica may be behind; ``None`` for no limit.

    Attributes:
        reason: why the backfill is paused, while it is.
    """

    def __init__(
        self, database: Database, rows_per_second: float | None, max_replica_lag: float | None
    ) -> None:
        self._database = database
        self._rate = rows_per_second
        self._lag = max_replica_lag
        self._next = self._look_at = time.monotonic()
        self.reason: str | None = None

    def wait(self) -> float:
        """Seconds until rows may be claimed; 0 where they may be now.

        Raises:
            CatalogError: this role cannot see how far the replicas are behind.
        """
        now = time.monotonic()
        if self._lag is not None and now >= self._look_at:
            with self._database.begin() as connection:
                lag = replica_lag(connection)
            behind = lag > self._lag
            self.reason = f"a replica is {lag:.1f} s behind" if behind else None
            self._look_at = time.monotonic() + _INTERVAL
        if self.reason is not None:
            return max(self._look_at - now, 0.01)
        return max(self._next - now, 0.0) if self._rate is not None else 0.0

    def spend(self, rows: int) -> None:
        """Take rows that were claimed into account."""
        if self._rate is not None:
            self._next = max(self._next, time.monotonic() - 1.0) + rows / self._rate


def replica_lag(connection: Connection) -> float:
    """Seconds that the slowest replica is behind in replaying; 0 where there is none.

    Raises:
        CatalogError: this role may not see it.
    """
    c = system.REPLICATION.c
    total, visible, lag = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count(c.state),
            sa.func.coalesce(sa.func.max(sa.extract("epoch", c.replay_lag)), 0),
        )
    ).one()
    if total and not visible:
        raise CatalogError(
            "This role cannot see how far the replicas are behind. Grant it pg_monitor (or "
            "pg_read_all_stats), or run without a limit on the lag."
        )
    return float(lag)
