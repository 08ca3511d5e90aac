"""The database as a worker uses it, with consideration.

Encoding is what costs, so vectors are kept while a server restarts, a connection drops or a disk is
full: transactions wait for a database that is away. A row that the database refuses is found by
halving its batch, and is the only one not written. A backfill is held back by a rate, and while
replicas fall behind.

Pending rows are heard of by LISTEN. Behind a pooler in transaction mode (pgbouncer) LISTEN succeeds
and nothing is ever heard: the server connection that listens goes back to the pool. So a listener
sends itself a notification over another connection first; where it does not arrive, it says so and
the worker polls.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog.tables import PENDING_CHANNEL
from sbert_pg.errors import CatalogError, DeclarationError
from sbert_pg.freshness.keys import driver_connection
from sbert_pg.freshness.settings import LOGGER, say
from sbert_pg.sqlstates import Fault, fault_of, words_of

T = TypeVar("T")
#: Vectors in pgvector's binary format by the label of their row; ``None`` clears the vector.
Payloads = Mapping[str, "bytes | None"]


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


class Pause:
    """Waits that double from try to try, and differ a little from process to process."""

    #: The first wait, and the longest, in seconds.
    FIRST, LONGEST = 0.1, 30.0

    def __init__(self) -> None:
        self._next = self.FIRST

    def next(self) -> float:
        """The wait to take now."""
        wait = self._next
        self._next = min(self._next * 2, self.LONGEST)
        return wait * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """Begin with the first again."""
        self._next = self.FIRST


class Patience:
    """Runs transactions until the database lets them through.

    Args:
        logger: where waiting is reported.
        stop: once it is set, there is little patience left.
        after_stop: how much, in seconds.
        on_trouble: called whenever a try fails for the database's sake.

    Attributes:
        trouble: what is wrong with the database, while something is.
    """

    def __init__(
        self,
        database: Database,
        logger: logging.Logger,
        stop: threading.Event,
        *,
        after_stop: float = 30.0,
        on_trouble: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._logger = logger
        self._stop = stop
        self._after_stop = after_stop
        self._on_trouble = on_trouble
        self._stopped_at: float | None = None
        self.trouble: str | None = None

    def run(self, what: str, do: Callable[[Connection], T]) -> T:
        """Do something in a transaction, again and again while the database is away.

        Args:
            what: what it is, to be read after "Cannot".
            do: what to do; may be called several times.

        Raises:
            Exception: what it raised, where waiting does not help or patience is out.
        """
        pause = Pause()
        while True:
            try:
                with self._database.begin() as connection:
                    result = do(connection)
            except Exception as error:
                if fault_of(error) not in (Fault.LOST, Fault.BUSY) or self._is_out():
                    raise
                self.trouble = words_of(error)
                self._on_trouble()
                wait = pause.next()
                fields = {"error": self.trouble, "retry_in": round(wait, 2)}
                say(self._logger, logging.WARNING, f"Cannot {what}; trying again", fields)
                time.sleep(min(wait, 1.0) if self._stop.is_set() else wait)
            else:
                self.trouble = None
                return result

    def _is_out(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return time.monotonic() - self._stopped_at > self._after_stop


@dataclass(slots=True)
class Pieces(Generic[T]):
    """What became of a batch that was written in one piece or several.

    Attributes:
        results: what each piece that was written returned.
        reasons: why a row was refused, by label.
        error: what ended the writing, where the batch as a whole could not go on.
    """

    results: list[T] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None


def write_in_pieces(
    patience: Patience, batch: Payloads, write: Callable[[Connection, Payloads], T]
) -> Pieces[T]:
    """Write a batch in one transaction, or in as many as its bad rows ask for."""
    done: Pieces[T] = Pieces()
    todo = [batch] if batch else []
    while todo:
        piece = todo.pop()
        try:
            done.results.append(patience.run("write vectors", _writing(write, piece)))
        except Exception as error:
            if fault_of(error) not in (Fault.ROW, Fault.SLOW):
                done.error = error
                break
            if len(piece) == 1:
                done.reasons.update(dict.fromkeys(piece, words_of(error)))
                continue
            labels = list(piece)
            middle = len(labels) // 2
            todo.append({label: piece[label] for label in labels[middle:]})
            todo.append({label: piece[label] for label in labels[:middle]})
    return done


def _writing(write: Callable[[Connection, Payloads], T], piece: Payloads) -> Callable[..., T]:
    return lambda connection: write(connection, piece)


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


class _UnavailableError(Exception):
    """LISTEN does not work here; the message says why."""


class Listener:
    """A thread with its own connection that is not returned to the engine's pool.

    Args:
        engine: where to listen.
        name: the worker's.
        on_notify: called, in the thread, for what is heard.
        on_state: called with whether it listens, whenever that changes.
    """

    def __init__(
        self,
        engine: sa.Engine,
        name: str,
        on_notify: OnNotify,
        on_state: Callable[[bool], None],
    ) -> None:
        self._engine = engine
        self._name = name
        self._on_notify = on_notify
        self._on_state = on_state
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sbert-pg-listen", daemon=True)
        self._said: str | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stop.set()
        self._thread.join(timeout=10)

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
