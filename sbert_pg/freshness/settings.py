"""What a worker is given: its settings, and a database that it uses with consideration.

A backfill is held back by a rate, and while replicas fall behind.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.errors import CatalogError, DeclarationError


def worker_name() -> str:
    """A name that no other worker has: host, process, and a few random digits."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of a worker or a backfill; the defaults suit a machine of two to eight cores.

    Attributes:
        columns: columns to keep fresh, as ``table``, ``table.column`` or ``schema.table.column``;
            all that are bound where it is empty.
        batch_size: rows claimed at a time.
        encoders: threads that call the encoder; with two, one batch is tokenised while the other is
            computed.
        lease: how long other workers leave claimed rows alone. It is renewed while they are worked
            on, so it only has to be longer than a pause of the process.
        poll_interval: seconds between looks for new and changed rows when nothing is heard of any.
            Where LISTEN does not work it is at most one second.
        rescan_interval: seconds between looks at the catalog for new columns, and at the backfill
            of columns where it was empty.
        max_attempts: attempts after which a row counts as failed, until its text changes.
        backoff: time before the second attempt; it doubles with each further one, up to an hour.
        busy_wait: how long to leave alone a row that another transaction holds locked.
        rows_per_second: most rows of the backfill a second and process; no limit by default. New
            and changed rows are never held back.
        max_replica_lag: seconds that the slowest replica may be behind in replaying before the
            backfill pauses; no limit by default.
        shutdown_timeout: seconds that a stopping worker waits for a database that is away.
        listen: whether to LISTEN at all.
        cache_rows: vectors kept in ``sbert.vector_cache``; none where it is 0.
        name: name of the worker, in leases and logs.
    """

    columns: tuple[str, ...] = ()
    batch_size: int = 256
    encoders: int = 2
    lease: timedelta = timedelta(seconds=60)
    poll_interval: float = 5.0
    rescan_interval: float = 30.0
    max_attempts: int = 5
    backoff: timedelta = timedelta(seconds=10)
    busy_wait: timedelta = timedelta(seconds=1)
    rows_per_second: float | None = None
    max_replica_lag: float | None = None
    shutdown_timeout: float = 30.0
    listen: bool = True
    cache_rows: int = 0
    name: str = field(default_factory=worker_name)

    def __post_init__(self) -> None:
        for name in ("batch_size", "encoders", "max_attempts"):
            if getattr(self, name) < 1:
                raise DeclarationError(f"{name} of a worker is at least 1.")
        for name in ("poll_interval", "rescan_interval", "rows_per_second"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise DeclarationError(f"{name} of a worker is more than 0.")
        if self.lease < timedelta(seconds=1):
            raise DeclarationError("The lease of a worker is at least one second.")


class Companion(Protocol):
    """Something that keeps up with the columns beside a worker, such as assignments to clusters."""

    def start(self) -> None:
        """Begin, in its own thread."""

    def stop(self) -> None:
        """End, and wait for it."""

    def look(self) -> object:
        """Do once what is to be done now."""


class Database:
    """An engine used at READ COMMITTED, whatever its own isolation level is.

    Each statement has to see what was committed before it: the check that a text is unchanged comes
    after the row is locked. The isolation level goes back with the connection to the pool.

    Args:
        engine: the application's engine.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection, for several transactions one after the other."""
        with self.engine.connect() as connection:
            yield connection.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in a transaction that is committed at the end."""
        with self.connect() as connection, connection.begin():
            yield connection


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
