"""Settings of workers and backfills, what may run beside them, how far a backfill has come."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from sbert_pg.errors import DeclarationError


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backfill has come.

    Attributes:
        rows: rows that are done since it was begun, by all processes.
        total: rows that were to be done when it was begun; ``None`` where unknown.
        rows_per_second: rate over the last minute.
        seconds_left: at that rate; ``None`` where unknown.
        paused: why it is paused, or ``None``.
        complete: whether nothing is left.
    """

    rows: int
    total: int | None
    rows_per_second: float
    seconds_left: float | None
    paused: str | None
    complete: bool


class Companion(Protocol):
    """Something that keeps up with the columns beside a worker, such as assignments to clusters."""

    def start(self) -> None:
        """Begin, in its own thread."""

    def stop(self) -> None:
        """End, and wait for it."""

    def look(self) -> object:
        """Do once what is to be done now."""
