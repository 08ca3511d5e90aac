"""Batches on their way: claimed in one transaction, read in another, encoded and written in order.

The encoder is the slowest part by far, so it must never wait: while it has one batch, the next is
being read (by whoever calls ``Flow.put``) and the last is being written (by a thread). Encoding
runs in two threads by default, so that one batch is tokenised while the other is computed.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import sqlalchemy as sa

from sbert_pg.freshness import claims
from sbert_pg.freshness.claims import Claimed
from sbert_pg.freshness.columns import Column, Shared
from sbert_pg.freshness.keys import CHANGED, Candidate, Class
from sbert_pg.freshness.status import note_caught_up
from sbert_pg.freshness.storing import Keeper, Work
from sbert_pg.sqlstates import Fault, fault_of, words_of

#: Claims rows under a token, in a transaction.
_Claim = Callable[[sa.Connection, str], list[Candidate]]


class Claimer:
    """Claims and reads batches; used by one thread."""

    def __init__(self, shared: Shared, keeper: Keeper) -> None:
        self._database = shared.database
        self._settings = shared.settings
        self._tally = shared.tally
        self._columns = shared.columns
        self._keeper = keeper
        self._numbers = itertools.count(1)
        self._abandoned: list[tuple[Column, str]] = []

    def claim(self, column: Column, class_: Class) -> tuple[Work | None, bool]:
        """The next batch of a class, and whether there may be more than that."""
        settings, cursor = self._settings, column.cursors[class_]
        started = time.monotonic()
        at_beginning = column.begin(class_)

        def claim(connection: sa.Connection, token: str) -> list[Candidate]:
            return claims.claim(
                connection, column.rows, class_, token=token, most=settings.batch_size,
                lease=settings.lease, after=cursor.after,
            )  # fmt: skip

        chosen, work = self._take(column, claim)
        if at_beginning:
            cursor.spent(time.monotonic() - started)
        cursor.after = chosen[-1].key if len(chosen) == settings.batch_size else None
        if class_ == CHANGED and not chosen and at_beginning:
            self._note_caught_up(column)
        # What lies before the cursor was not looked at.
        return work, bool(chosen) or not at_beginning

    def claim_alone(self, column: Column) -> Work | None:
        """One row that failed before, or was in hand when a process came to an end."""

        def claim(connection: sa.Connection, token: str) -> list[Candidate]:
            one = claims.claim_alone(
                connection, column.rows, token=token, lease=self._settings.lease
            )
            return [] if one is None else [one]

        return self._take(column, claim)[1]

    def look_for_ended(
        self, columns: Sequence[Column]
    ) -> tuple[list[tuple[Column, list[str]]], bool, bool]:
        """What has come to an end, leases and waits.

        Returns:
            Rows that ended a process at each attempt, whether rows that were put off are in the
            queue again, and whether rows are due to be tried alone.
        """
        settings = self._settings
        ended = []
        with self._database.begin() as connection:
            for column in columns:
                labels = claims.expire(
                    connection, column.binding,
                    max_attempts=settings.max_attempts, backoff=settings.backoff,
                )  # fmt: skip
                if labels:
                    ended.append((column, labels))
            back, due = claims.end_waits(connection, [column.binding for column in columns])
        return ended, back, due

    def give_back(self) -> None:
        """Let go of rows that were claimed and could not be read."""
        while self._abandoned:
            column, token = self._abandoned[-1]
            with self._database.begin() as connection:
                claims.release(connection, column.binding, token)
            self._abandoned.pop()

    def _take(self, column: Column, claim: _Claim) -> tuple[list[Candidate], Work | None]:
        """Claim rows and read their texts; blocks a column where that cannot be done."""
        started = time.perf_counter()
        token = f"{self._settings.name}/{next(self._numbers)}"
        try:
            with self._database.connect() as connection:
                with connection.begin():
                    chosen = claim(connection, token)
                if not chosen:
                    return [], None
                self._keeper.hold(token)
                with connection.begin():
                    column.rows.prepare(connection)
                    read = column.rows.read(connection, chosen)
        except sa.exc.SQLAlchemyError as error:
            self._keeper.drop(token)
            self._abandoned.append((column, token))
            fault = fault_of(error)
            if fault is Fault.COLUMN:
                self._columns.block(column.binding, words_of(error))
            elif fault is not Fault.ROW:
                raise
            # A key that could be read a moment ago: what it is made of has just changed.
            return [], None
        with self._tally.of(column.name) as tally:
            tally.batches += 1
            tally.claim.add(time.perf_counter() - started)
        return chosen, Work(column, Claimed(token, tuple(read)))

    def _note_caught_up(self, column: Column) -> None:
        """Note that nothing new is pending, once a second at most."""
        now = time.monotonic()
        if now < column.caught_up_at + 1.0:
            return
        column.caught_up_at = now
        with self._database.begin() as connection:
            note_caught_up(connection, column.binding)


Batch = TypeVar("Batch")
Result = TypeVar("Result")

#: How often a thread that waits for room looks whether it should stop, in seconds.
_LOOK = 0.2


class Flow(Generic[Batch, Result]):
    """A pipeline of three stages; use it as a context manager.

    Args:
        encode: makes the result of a batch; called in several threads.
        write: takes batch and result, in the order of ``put``; called in one thread.
        encoders: threads that encode.
    """

    def __init__(
        self,
        encode: Callable[[Batch], Result],
        write: Callable[[Batch, Result], None],
        *,
        encoders: int,
    ) -> None:
        self._encode = encode
        self._write = write
        self._pool = ThreadPoolExecutor(encoders, thread_name_prefix="sbert-pg-encode")
        # One batch waits, encoded or not, beside those that are being encoded.
        self._queue: queue.Queue[tuple[Batch, Future[Result]] | None] = queue.Queue(encoders + 1)
        self._writer = threading.Thread(target=self._write_all, name="sbert-pg-write", daemon=True)
        self._lock = threading.Condition()
        self._open = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Flow[Batch, Result]:
        self._writer.start()
        return self

    def put(self, batch: Batch) -> None:
        """Hand a batch over; waits while enough are under way.

        Raises:
            Exception: what a stage raised; nothing is taken after that.
        """
        self._raise()
        with self._lock:
            self._open += 1
        entry = (batch, self._pool.submit(self._encode, batch))
        while True:
            try:
                self._queue.put(entry, timeout=_LOOK)
                return
            except queue.Full:
                self._raise()

    @property
    def under_way(self) -> int:
        """Batches that were put and are not written yet."""
        with self._lock:
            return self._open

    def drain(self) -> None:
        """Wait until everything that was put is written.

        Raises:
            Exception: what a stage raised.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._open == 0 or self._error is not None)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            batch, future = entry
            try:
                if self._error is None:
                    self._write(batch, future.result())
            except BaseException as error:  # Handed to the thread that puts.
                self._error = error
            finally:
                with self._lock:
                    self._open -= 1
                    self._lock.notify_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._error is None:
            # The reader failed: what is under way is encoded no further.
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._queue.put(None)
        self._writer.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if error is None:
            self._raise()
