"""Workers that listen, and what a database knows of its workers.

Pending rows are heard of by LISTEN. Behind a pooler in transaction mode (pgbouncer) LISTEN succeeds
and nothing is ever heard: the server connection that listens goes back to the pool. So a listener
sends itself a notification over another connection first; where it does not arrive, it says so and
the worker polls.

The database itself knows who listens, who has rows in hand, and who came to an end with some.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import Connection

from sbert_pg import catalog, system
from sbert_pg.catalog import PENDING_CHANNEL, installed, tables
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness.queue import driver_connection
from sbert_pg.freshness.settings import LOGGER, Background, say
from sbert_pg.freshness.status import ColumnStatus
from sbert_pg.sqlstates import words_of

logger = logging.getLogger(LOGGER)

#: Called with the identity of the binding that has pending rows; ``None`` means that some may have
#: been missed.
OnNotify = Callable[["uuid.UUID | None"], None]

#: Seconds within which the listener's own notification has to arrive.
TEST_TIMEOUT = 3.0
#: Seconds between looks whether the connection is alive.
_HEARTBEAT = 30.0
#: Seconds after which LISTEN is tried again where it did not work.
_RETRY_UNAVAILABLE = 300.0
_RETRY_LOST = 2.0
#: How often the thread looks whether it should stop, in seconds.
_LOOK = 0.5
_TEST_PREFIX = "test:"
#: What the connection is called in ``pg_stat_activity``, before the worker's name.
LISTENS_AS = "sbert-pg worker "
_claim, _session = tables.claim.c, system.ACTIVITY.c


@dataclass(frozen=True, slots=True)
class Lease:
    """Rows that one worker has in hand; ``left`` are seconds until others may take them, below zero
    where the worker came to an end, as it renews its leases, and no other has taken over.
    """

    worker: str
    rows: int
    left: float


@dataclass(frozen=True, slots=True)
class SeenWorkers:
    """The workers of a database: names, cut to 47 characters, of those that wait for notifications,
    and leases by column. Those that poll (behind a pooler, or ``--once``) have leases alone.
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
    """The workers that a database sees, none without a catalog; it only reads."""
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


class _UnavailableError(Exception):
    """LISTEN does not work here; the message says why."""


class Listener(Background):
    """A thread with its own connection that is not returned to the engine's pool.

    It calls ``on_notify`` for what is heard, and ``on_state`` when it begins or ends to listen.
    """

    thread_name = "sbert-pg-listen"

    def __init__(
        self, engine: sa.Engine, name: str, on_notify: OnNotify, on_state: Callable[[bool], None]
    ) -> None:
        super().__init__()
        self._engine = engine
        self._name = name
        self._on_notify = on_notify
        self._on_state = on_state
        self._said: str | None = None

    def _run(self) -> None:
        while not self._stop.is_set():
            wait = _RETRY_LOST
            try:
                self._listen()
            except _UnavailableError as error:
                wait = _RETRY_UNAVAILABLE
                self._say_once(f"Polling for pending rows: {error}")
            except (sa.exc.SQLAlchemyError, psycopg.Error, OSError) as error:
                self._say_once(f"Lost the connection that listens: {words_of(error)}")
            self._on_state(False)
            self._stop.wait(wait)

    def _say_once(self, message: str) -> None:
        if message != self._said and not self._stop.is_set():
            self._said = message
            say(logger, logging.WARNING, message)

    def _connect(self) -> sa.Connection:
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _listen(self) -> None:
        with self._connect() as connection:
            try:
                driver = driver_connection(connection)
            except DeclarationError as error:
                raise _UnavailableError(str(error)) from error
            # It waits for notifications for as long as it lives, so the pool gets its place back.
            connection.detach()
            driver.execute(sql.SQL("LISTEN {}").format(sql.Identifier(PENDING_CHANNEL)))
            self._test(driver)
            # Only now: a pooler's connection would keep the name, and be of another client.
            called = (LISTENS_AS + self._name)[:63]  # which the server keeps in ASCII
            driver.execute("SELECT set_config('application_name', %s, false)", [called])
            self._said = None
            say(logger, logging.INFO, "Listening for pending rows")
            self._on_state(True)
            # Before now nothing was heard.
            self._on_notify(None)
            heartbeat = time.monotonic() + _HEARTBEAT
            while not self._stop.is_set():
                for notification in driver.notifies(timeout=_LOOK):
                    self._hear(notification.payload)
                if time.monotonic() > heartbeat:
                    driver.execute("SELECT 1")
                    heartbeat = time.monotonic() + _HEARTBEAT

    def _test(self, driver: psycopg.Connection[object]) -> None:
        """Send a notification from another connection and wait for it here."""
        word = f"{_TEST_PREFIX}{uuid.uuid4()}"
        with self._connect() as other:
            other.execute(sa.select(sa.func.pg_notify(PENDING_CHANNEL, word)))
        until = time.monotonic() + TEST_TIMEOUT
        while (left := until - time.monotonic()) > 0 and not self._stop.is_set():
            for notification in driver.notifies(timeout=left, stop_after=1):
                if notification.payload == word:
                    return
                self._hear(notification.payload)
        driver.execute("UNLISTEN *")
        raise _UnavailableError(
            "LISTEN succeeds, but a notification sent over another connection does not arrive. A "
            "pooler in transaction mode, such as pgbouncer, stands between. New rows are found by "
            "polling; to have them embedded at once, connect the worker to the server directly or "
            "to a pool in session mode"
        )

    def _hear(self, payload: str) -> None:
        # What is not an identity is a test of another worker's, or nothing of ours.
        with contextlib.suppress(ValueError):
            self._on_notify(uuid.UUID(payload))
