"""A thread that renews the leases of what is being worked on, and looks at the backlog."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from sbert_pg.catalog.tables import pending
from sbert_pg.pending import claims
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import words_of
from sbert_pg.worker.logs import LOGGER, say
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.tally import Backlog, Tally

logger = logging.getLogger(LOGGER)

#: Seconds between looks at the backlog.
BACKLOG_INTERVAL = 15.0


class Keeper:
    """Leases and backlog.

    Args:
        database: the database.
        settings: the worker's.
        tally: where the backlog is noted.
    """

    def __init__(self, database: Database, settings: WorkerSettings, tally: Tally) -> None:
        self._database = database
        self._lease = settings.lease
        self._tally = tally
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, list[str], float]] = {}
        self._names: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: Whether somebody reads the backlog, so that it has to be looked at.
        self.watch_backlog = False

    def start(self) -> None:
        """Begin."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="sbert-pg-keep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def set_names(self, names: Mapping[int, str]) -> None:
        """Take note of what the columns are called."""
        with self._lock:
            self._names = dict(names)

    def hold(self, token: str, column_id: int, keys: Sequence[str]) -> None:
        """Renew the lease of these rows from now on."""
        with self._lock:
            self._held[token] = (column_id, list(keys), time.monotonic())

    def drop(self, token: str) -> None:
        """Renew it no longer."""
        with self._lock:
            self._held.pop(token, None)

    def _run(self) -> None:
        period = self._lease.total_seconds() / 3
        backlog_due = 0.0
        renew_due = time.monotonic() + period
        while not self._stop.wait(min(period, 1.0)):
            now = time.monotonic()
            try:
                if now >= renew_due:
                    renew_due = now + period
                    self._renew(now - period / 2)
                if self.watch_backlog and now >= backlog_due:
                    backlog_due = now + BACKLOG_INTERVAL
                    self._look()
            except sa.exc.SQLAlchemyError as error:
                fields = {"error": words_of(error)}
                say(logger, logging.DEBUG, "Cannot renew leases or look at the backlog", fields)

    def _renew(self, before: float) -> None:
        with self._lock:
            held = [(token, *entry) for token, entry in self._held.items() if entry[2] < before]
        for token, column_id, keys, _ in held:
            with self._database.begin() as connection:
                claims.renew(connection, column_id, token, keys, self._lease)

    def _look(self) -> None:
        c = pending.c
        age = sa.func.extract("epoch", sa.func.now() - sa.func.min(c.marked_at).filter(~c.failed))
        statement = sa.select(
            c.column_id,
            sa.func.count().filter(~c.failed),
            sa.func.coalesce(age, 0),
            sa.func.count().filter(c.failed),
        ).group_by(c.column_id)
        with self._database.begin() as connection:
            found = {row[0]: row for row in connection.execute(statement)}
        with self._lock:
            names = dict(self._names)
        nothing = (0, 0, 0, 0)
        self._tally.set_backlog(
            {
                name: Backlog(int(row[1]), float(row[2]), int(row[3]))
                for number, name in names.items()
                for row in [found.get(number, nothing)]
            }
        )


__all__ = ["Keeper"]
