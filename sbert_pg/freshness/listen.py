"""Hear of pending rows by LISTEN, and find out where that does not work.

Behind a pooler in transaction mode (pgbouncer) LISTEN succeeds and nothing is ever heard: the
server connection that listens goes back to the pool. So a listener sends itself a notification over
another connection first; where it does not arrive, it says so and the worker polls.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable

import psycopg
import sqlalchemy as sa
from psycopg import sql

from sbert_pg.catalog.tables import PENDING_CHANNEL
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness.keys import driver_connection
from sbert_pg.freshness.settings import LOGGER, say
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


class _UnavailableError(Exception):
    """LISTEN does not work here; the message says why."""


class Listener:
    """A thread with its own connection that is not returned to the engine's pool.

    Args:
        engine: where to listen.
        on_notify: called, in the thread, for what is heard.
        on_state: called with whether it listens, whenever that changes.
    """

    def __init__(
        self, engine: sa.Engine, on_notify: OnNotify, on_state: Callable[[bool], None]
    ) -> None:
        self._engine = engine
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
