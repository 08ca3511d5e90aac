"""Batches for a worker: claimed in one transaction and read in another, ready to be encoded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from sbert_pg.freshness import claims
from sbert_pg.freshness.claims import Claimed
from sbert_pg.freshness.columns import Column, Columns
from sbert_pg.freshness.database import Database
from sbert_pg.freshness.labels import CHANGED, Candidate, Class
from sbert_pg.freshness.settings import WorkerSettings
from sbert_pg.freshness.status import note_caught_up
from sbert_pg.freshness.storing import Keeper, Work
from sbert_pg.freshness.tally import Tally
from sbert_pg.sqlstates import Fault, fault_of, words_of

#: Claims rows under a token, in a transaction.
_Claim = Callable[[sa.Connection, str], list[Candidate]]


class Claimer:
    """Claims and reads batches; used by one thread.

    Args:
        settings: the worker's.
        tally: where it is counted.
        columns: the worker's.
    """

    def __init__(
        self,
        database: Database,
        settings: WorkerSettings,
        tally: Tally,
        columns: Columns,
        keeper: Keeper,
    ) -> None:
        self._database = database
        self._settings = settings
        self._tally = tally
        self._columns = columns
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
