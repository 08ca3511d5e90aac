"""The last step of a batch: write what was encoded, whatever happens to the database meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import sqlalchemy as sa

from sbert_pg.pending import claims
from sbert_pg.pending.claims import Claimed, Written
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of
from sbert_pg.pending.patience import Patience, Payloads, write_in_pieces
from sbert_pg.pending.texts import Embedded
from sbert_pg.worker.keeping import Keeper
from sbert_pg.worker.logs import LOGGER, say
from sbert_pg.worker.serving import Served, Serving
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.tally import Tally
from sbert_pg.worker.work import Work

logger = logging.getLogger(LOGGER)


class Store:
    """Writes batches; called in one thread.

    Args:
        database: the database.
        settings: the worker's.
        tally: where it is counted.
        serving: the columns.
        keeper: renews the leases meanwhile.
        stop: set when the worker is to stop.
    """

    def __init__(
        self,
        database: Database,
        settings: WorkerSettings,
        tally: Tally,
        serving: Serving,
        keeper: Keeper,
        stop: threading.Event,
    ) -> None:
        self._database = database
        self._settings = settings
        self._tally = tally
        self._serving = serving
        self._keeper = keeper
        self._patience = Patience(
            database,
            logger,
            stop,
            after_stop=settings.shutdown_timeout,
            on_trouble=tally.count_database_error,
        )
        self._due: float | None = None

    @property
    def trouble(self) -> str | None:
        """What is wrong with the database, while something is."""
        return self._patience.trouble

    def due_in(self) -> float | None:
        """Seconds until a row that was put off is due; asking clears it."""
        due, self._due = self._due, None
        return None if due is None else max(due - time.monotonic(), 0.0)

    def store(self, work: Work, embedded: Embedded | Exception) -> None:
        """Write a batch; its marks are removed, released or given a reason."""
        served, claimed = work.served, work.claimed
        try:
            if isinstance(embedded, Exception):
                self._serving.block(served.id, served.name, embedded)
                self.release(served, claimed.token, [claim.key for claim in claimed.claims])
            else:
                self._write(served, claimed, embedded)
        finally:
            self._keeper.drop(claimed.token)

    def _write(self, served: Served, claimed: Claimed, embedded: Embedded) -> None:
        started = time.perf_counter()
        without_orphans = Claimed(claimed.token, claimed.claims, claimed.rows)

        def write(
            connection: sa.Connection, piece: Payloads, earlier: Sequence[Written]
        ) -> Written:
            part = without_orphans if earlier else claimed
            return claims.write(connection, served.rows, part, piece)

        done = write_in_pieces(self._patience, [embedded.vectors], write)
        with self._tally.of(served.name) as tally:
            tally.write.add(time.perf_counter() - started)
        if done.error is not None:
            if fault_of(done.error) is Fault.COLUMN:
                self._serving.block(served.id, served.name, done.error)
            self.release(served, claimed.token, done.left)
        self._settle(served, claimed.token, done.results, {**embedded.failures, **done.reasons})

    def _settle(
        self, served: Served, token: str, written: Sequence[Written], reasons: Mapping[str, str]
    ) -> None:
        """Let go of what was not written, and count."""
        changed = [key for part in written for key in part.changed]
        busy = [key for part in written for key in part.busy]
        with self._tally.of(served.name) as tally:
            tally.embedded += sum(part.rows for part in written)
            tally.changed += len(changed)
            tally.busy += len(busy)
        if not (changed or busy or reasons):
            return
        wait = self._settings.busy_wait

        def settle(connection: sa.Connection) -> int:
            claims.release(connection, served.id, token, changed)
            claims.release(connection, served.id, token, busy, after=wait)
            return self.fail(connection, served.id, token, reasons)

        failed, _ = self._patience.attempt("let go of rows", settle)
        self.say_failures(served, reasons, failed or 0)
        self._put_off(timedelta(0) if changed else wait if busy else self._settings.backoff)

    def fail(
        self, connection: sa.Connection, column_id: int, token: str, reasons: Mapping[str, str]
    ) -> int:
        """Record why rows could not be embedded; returns how many are failed for good."""
        return claims.fail(
            connection,
            column_id,
            token,
            reasons,
            max_attempts=self._settings.max_attempts,
            backoff=self._settings.backoff,
        )

    def say_failures(self, served: Served, reasons: Mapping[str, str], failed: int) -> None:
        """Count and log why rows could not be embedded; their text is not logged."""
        with self._tally.of(served.name) as tally:
            tally.errors += len(reasons)
            tally.failed += failed
        for key, reason in reasons.items():
            fields = {"column": served.name, "key": key, "reason": reason}
            say(logger, logging.WARNING, f"Cannot embed row {key} of {served.name}", fields)

    def release(self, served: Served, token: str, keys: Sequence[str]) -> None:
        """Give rows back unfinished; if that fails, their lease ends by itself."""
        try:
            with self._database.begin() as connection:
                claims.release(connection, served.id, token, keys)
        except sa.exc.SQLAlchemyError as error:
            fields = {"column": served.name, "rows": len(keys), "error": words_of(error)}
            say(logger, logging.WARNING, "Could not give rows back; their lease will end", fields)

    def _put_off(self, wait: timedelta) -> None:
        due = time.monotonic() + wait.total_seconds()
        self._due = due if self._due is None else min(due, self._due)


__all__ = ["Store"]
