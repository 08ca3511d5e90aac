"""What holds a backfill back: a rate, replicas that fall behind, queries that become slow."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog import system
from sbert_pg.errors import BackfillError, CatalogError, SbertPgError
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of

logger = logging.getLogger("sbert_pg.backfill")

#: Seconds between looks at replicas and latency.
INTERVAL = 1.0
#: Latest probes of the latency that are looked at; their median counts.
_PROBES = 5


class Rate:
    """At most so many rows a second, with bursts of at most one second's worth.

    Args:
        rows_per_second: the rate; ``None`` for no limit.
    """

    def __init__(self, rows_per_second: float | None) -> None:
        self._rate = rows_per_second
        self._next = time.monotonic()

    def wait(self, rows: int, stop: threading.Event) -> None:
        """Wait until so many rows may be read."""
        if self._rate is None:
            return
        now = time.monotonic()
        if self._next > now:
            stop.wait(self._next - now)
        self._next = max(self._next, now - 1.0) + rows / self._rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a backfill is to pause.

    Attributes:
        replica_lag: seconds that the slowest replica may be behind.
        latency: seconds that the probe may take (the median of its last five times).
        probe: what is timed, such as a typical query of the application's; runs in a transaction
            that is rolled back.
    """

    replica_lag: float | None = None
    latency: float | None = None
    probe: Callable[[Connection], object] | None = None


class Gate:
    """A thread that looks whether the limits hold, and whom the reader asks.

    Args:
        database: the database.
        limits: the limits.
        default_probe: what is timed where the limits do not say.

    Attributes:
        reason: why the backfill is paused, while it is.
    """

    def __init__(
        self, database: Database, limits: Limits, default_probe: Callable[[Connection], object]
    ) -> None:
        self._database = database
        self._limits = limits
        self._probe = limits.probe or default_probe
        self._times: deque[float] = deque(maxlen=_PROBES)
        self._stop = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._run, name="sbert-pg-gate", daemon=True)
        self._error: Exception | None = None
        self.reason: str | None = None

    def start(self) -> None:
        """Begin, if there are limits."""
        if self._limits.replica_lag is not None or self._limits.latency is not None:
            self._try()
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def wait(self, stop: threading.Event) -> None:
        """Wait while the backfill is paused.

        Raises:
            CatalogError: this role cannot see how far the replicas are behind.
            BackfillError: the probe fails.
        """
        while not self._open.wait(0.2) and not stop.is_set():
            pass
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self._try()
            except SbertPgError as error:
                self._error = error
                self._open.set()
                return

    def _try(self) -> None:
        try:
            self._look()
        except sa.exc.SQLAlchemyError as error:
            if fault_of(error) not in (Fault.LOST, Fault.BUSY, Fault.SLOW):
                raise BackfillError(
                    f"The limits of the backfill cannot be looked at: {words_of(error)}. Mend the "
                    "probe, or run without it."
                ) from error
            # The reader and the writer meet the same trouble, and wait.
            logger.debug("Cannot look at the limits: %s", words_of(error))

    def _look(self) -> None:
        with self._database.connect() as connection, connection.begin() as transaction:
            reason = self._reason(connection)
            transaction.rollback()
        if reason != self.reason:
            fields = {"reason": reason}
            words = f"Paused: {reason}" if reason else "Going on"
            logger.info(words, extra={"fields": fields})
        self.reason = reason
        if reason is None:
            self._open.set()
        else:
            self._open.clear()

    def _reason(self, connection: Connection) -> str | None:
        if self._limits.replica_lag is not None:
            lag = replica_lag(connection)
            if lag > self._limits.replica_lag:
                return f"a replica is {lag:.1f} s behind"
        if self._limits.latency is not None:
            started = time.perf_counter()
            self._probe(connection)
            self._times.append(time.perf_counter() - started)
            median = statistics.median(self._times)
            if median > self._limits.latency:
                return f"a probe takes {1000 * median:.0f} ms"
        return None


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


__all__ = ["Gate", "Limits", "Rate", "replica_lag"]
