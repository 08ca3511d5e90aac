"""What happens to a claimed batch: its lease is renewed, its vectors are written, it is let go.

Encoding is what costs, so vectors are kept while a server restarts, a connection drops or a disk is
full: transactions wait for a database that is away. A row that the database refuses is found by
halving its batch, and is the only one not written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Generic, TypeVar
from uuid import UUID

import sqlalchemy as sa

from sbert_pg.freshness import claims
from sbert_pg.freshness.columns import Column, Shared, Work
from sbert_pg.freshness.encoding import Embedded
from sbert_pg.freshness.queue import COUNTED, Row, Written, counts, shown
from sbert_pg.freshness.settings import LOGGER, Background, say
from sbert_pg.sqlstates import Fault, fault_of, words_of
from sbert_pg.system import Pause

logger = logging.getLogger(LOGGER)

T = TypeVar("T")
#: Vectors in pgvector's binary format by the label of their row; ``None`` clears the vector.
Payloads = Mapping[str, "bytes | None"]

#: Seconds between looks at the backlog.
BACKLOG_INTERVAL = 15.0
#: How often in a row a trigger may change a text that is being embedded; rows that are watched.
_REWRITES, _REMEMBERED = 2, 10_000
_LEFT_OUT = "a trigger of the table keeps the vector from being written"


class Patience:
    """Runs transactions until the database lets them through.

    Once ``stop`` is set, patience lasts as long as the settings say. ``trouble`` is what is wrong
    with the database, while something is.
    """

    def __init__(self, shared: Shared, stop: threading.Event) -> None:
        self._shared = shared
        self._stop = stop
        self._stopped_at: float | None = None
        self.trouble: str | None = None

    def run(self, what: str, do: Callable[[sa.Connection], T]) -> T:
        """Do something, whose name follows "Cannot", again and again while the database is away."""
        pause = Pause()
        while True:
            try:
                with self._shared.database.begin() as connection:
                    result = do(connection)
            except Exception as error:
                if fault_of(error) not in (Fault.LOST, Fault.BUSY) or self._is_out():
                    raise
                self.trouble = words_of(error)
                self._shared.tally.count_database_error()
                wait = pause.next()
                fields = {"error": self.trouble, "retry_in": round(wait, 2)}
                say(logger, logging.WARNING, f"Cannot {what}; trying again", fields)
                time.sleep(min(wait, 1.0) if self._stop.is_set() else wait)
            else:
                self.trouble = None
                return result

    def _is_out(self) -> bool:
        if not self._stop.is_set():
            return False
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        return time.monotonic() - self._stopped_at > self._shared.settings.shutdown_timeout


@dataclass(slots=True)
class Pieces(Generic[T]):
    """What became of a batch: what each piece that was written returned, why rows were refused, by
    label, and what ended the writing where the batch as a whole could not go on.
    """

    results: list[T] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None


def write_in_pieces(
    patience: Patience, batch: Payloads, write: Callable[[sa.Connection, Payloads], T]
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


def _writing(write: Callable[[sa.Connection, Payloads], T], piece: Payloads) -> Callable[..., T]:
    return lambda connection: write(connection, piece)


class Keeper(Background):
    """A thread that renews leases of what is worked on, and looks at the backlog if it is read."""

    thread_name = "sbert-pg-keep"

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self._database = shared.database
        self._lease = shared.settings.lease
        self._tally = shared.tally
        self._columns = shared.columns
        self._lock = threading.Lock()
        self._held: dict[str, float] = {}
        self.watch_backlog = False

    def hold(self, token: str) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._held[token] = time.monotonic()

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
            held = [token for token, since in self._held.items() if since < before]
        if held:
            with self._database.begin() as connection:
                claims.renew(connection, held, self._lease)

    def _look(self) -> None:
        backlog = {}
        for column in self._columns.served():
            with self._database.begin() as connection:
                backlog[column.name] = counts(connection, column.binding, cap=COUNTED)
        self._tally.backlog = backlog


class Store:
    """Writes batches; called in one thread."""

    def __init__(self, shared: Shared, keeper: Keeper, stop: threading.Event) -> None:
        self._settings = shared.settings
        self._tally = shared.tally
        self._columns = shared.columns
        self._keeper = keeper
        self._patience = Patience(shared, stop)
        self._due: float | None = None
        self._rewritten: dict[tuple[UUID, str], int] = {}

    @property
    def trouble(self) -> str | None:
        """What is wrong with the database, while something is."""
        return self._patience.trouble

    def due_in(self) -> float | None:
        """Seconds until a row that was put off is due; asking clears it."""
        due, self._due = self._due, None
        return None if due is None else max(due - time.monotonic(), 0.0)

    def store(self, work: Work, embedded: Embedded | Exception) -> None:
        """Write a batch, and let go of it."""
        released = False
        try:
            if isinstance(embedded, Exception):
                self._columns.block(work.column.binding, words_of(embedded))
            else:
                released = self._write(work, embedded)
        finally:
            self._keeper.drop(work.token)
            if not released:
                # Where that fails, the lease ends by itself.
                self._try(
                    "give rows back",
                    lambda c: claims.release(c, work.column.binding, work.token),
                )

    def _write(self, work: Work, embedded: Embedded) -> bool:
        """Write what was encoded; returns whether the lease was given back with it."""
        started = time.perf_counter()
        column, rows = work.column, work.rows
        before = {row.label for row in rows if row.failed_before}
        wait = self._settings.busy_wait
        released = False

        def write(connection: sa.Connection, piece: Payloads) -> Written:
            nonlocal released
            written = column.rows.write(connection, rows, piece, embedded.cuts, embedded.passages)
            settled = before.intersection(written.rows).difference(written.again)
            claims.forget(connection, column.binding, sorted(settled))
            # Before the lease is gone, or the row would be claimed and encoded again at once.
            claims.put_off(connection, column.binding, sorted(written.busy), wait)
            released = len(piece) == len(rows)
            if released:
                claims.release(connection, column.binding, work.token)
            return written

        done = write_in_pieces(self._patience, embedded.vectors, write)
        with self._tally.of(column.name) as tally:
            tally.write.add(time.perf_counter() - started)
        if done.error is not None and fault_of(done.error) is Fault.COLUMN:
            self._columns.block(column.binding, words_of(done.error))
            released = False
        self._settle(column, rows, done.results, {**embedded.failures, **done.reasons})
        return released and bool(done.results)

    def _settle(
        self,
        column: Column,
        rows: Sequence[Row],
        written: Sequence[Written],
        reasons: Mapping[str, str],
    ) -> None:
        """Count, and record what was not written."""
        done = sum(written, Written((), (), ()))
        reasons = {
            **reasons,
            **self._rewritten_too_often(column, rows, done.again),
            **dict.fromkeys(done.left_out, _LEFT_OUT),
        }
        without_text = {row.label for row in rows if row.of is None}
        with self._tally.of(column.name) as tally:
            tally.embedded += sum(label not in without_text for label in done.rows)
            tally.changed += len(done.changed)
            tally.busy += len(done.busy)
        if done.busy:
            self._put_off(self._settings.busy_wait)
        if reasons:
            self._fail(column, rows, reasons)
            self._put_off(self._settings.backoff)
        if done.changed or done.again:
            self._put_off(timedelta(0))

    def _rewritten_too_often(
        self, column: Column, rows: Sequence[Row], again: Sequence[str]
    ) -> dict[str, str]:
        """Rows whose text a trigger changes at each write of their vector, which would never end.

        Once or twice is what a trigger does that brings a text into a certain form.
        """
        for row in rows:
            key = (column.binding.id, row.label)
            if row.label not in again:
                self._rewritten.pop(key, None)
            elif len(self._rewritten) < _REMEMBERED:
                self._rewritten[key] = self._rewritten.get(key, 0) + 1
        return {
            label: "a trigger changes the text of the row whenever its vector is written"
            for label in again
            if self._rewritten.get((column.binding.id, label), 0) > _REWRITES
        }

    def _fail(self, column: Column, rows: Sequence[Row], reasons: Mapping[str, str]) -> None:
        settings = self._settings
        texts = {row.label: row.of for row in rows if row.label in reasons}

        def fail(connection: sa.Connection) -> list[str]:
            return claims.fail(
                connection, column.binding, reasons, texts,
                max_attempts=settings.max_attempts, backoff=settings.backoff,
            )  # fmt: skip

        failed = self._try("record failures", fail) or []
        self._report(column, reasons, len(failed))
        self._write_failed(column, [row for row in rows if row.label in failed])

    def conclude(self, column: Column, labels: Sequence[str]) -> None:
        """Fail rows that ended a process each time they were tried."""
        self._report(column, dict.fromkeys(labels, claims.ENDED), len(labels))
        ended = self._try("record failures", lambda c: claims.conclude(c, column.rows, labels))
        self._write_failed(column, ended or [])

    def _write_failed(self, column: Column, rows: Sequence[Row]) -> None:
        """Write into rows that their text failed, so that the queue is rid of them.

        A column that is ``NOT NULL``, or a row that cannot be changed at all, has only the record.
        """
        if not rows or column.rows.required:
            return
        nothing: Payloads = dict.fromkeys((row.label for row in rows), None)
        done = write_in_pieces(self._patience, nothing, lambda c, p: column.rows.write(c, rows, p))
        if done.error is not None or done.reasons:
            fields = {"column": column.name, "rows": len(rows)}
            say(logger, logging.DEBUG, "Rows that failed cannot be changed", fields)

    def _report(self, column: Column, reasons: Mapping[str, str], failed: int) -> None:
        """Count and log why rows could not be embedded; their text is not logged."""
        with self._tally.of(column.name) as tally:
            tally.errors += len(reasons)
            tally.failed += failed
        for label, reason in reasons.items():
            fields = {"column": column.name, "key": shown(label), "reason": reason}
            words = f"Cannot embed row {shown(label)} of {column.name}"
            say(logger, logging.WARNING, words, fields)

    def _try(self, what: str, do: Callable[[sa.Connection], T]) -> T | None:
        """Do something that may be left undone: the rows stay pending by what they say."""
        try:
            return self._patience.run(what, do)
        except Exception as error:
            fields = {"error": words_of(error)}
            say(logger, logging.WARNING, f"Cannot {what}", fields)
            return None

    def _put_off(self, wait: timedelta) -> None:
        due = time.monotonic() + wait.total_seconds()
        self._due = due if self._due is None else min(due, self._due)
