"""Which columns a worker keeps fresh, which it cannot and why, and claims of their rows."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.errors import BindingError, NotBoundError
from sbert_pg.freshness import claims
from sbert_pg.freshness.cutting import Cutter
from sbert_pg.freshness.encoding import CachedEncoder, held_encoder
from sbert_pg.freshness.queue import (
    CHANGED,
    Candidate,
    Class,
    Key,
    Row,
    counts,
    note_caught_up,
    queue_fault,
)
from sbert_pg.freshness.rows import Rows, rows_of
from sbert_pg.freshness.settings import LOGGER, Database, Tally, WorkerSettings, say
from sbert_pg.spec import TextEncoder
from sbert_pg.sqlstates import Fault, fault_of, words_of

logger = logging.getLogger(LOGGER)

#: Claims rows under a token, in a transaction.
_Claim = Callable[[sa.Connection, str], list[Candidate]]
#: Seconds after which a column that could not be served is tried again.
BLOCKED_FOR = 60.0
#: A claim from the queue's beginning reads past what was done since the last vacuum, so it may take
#: this share of the time.
_SHARE_OF_RESTARTS = 0.05


@dataclass(slots=True)
class Cursor:
    """Where the next claim of a class begins, so that claims of a long queue stay equally fast:
    after the last row that was claimed, until it is time (``again_at``) for what is new before it.
    """

    after: Key | None = None
    again_at: float = 0.0

    def begin(self, shortest: float) -> bool:
        """Go back to the beginning if it is time; returns whether the claim begins there."""
        now = time.monotonic()
        if self.after is not None and now >= self.again_at:
            self.after = None
        if self.after is None:
            self.again_at = now + shortest
        return self.after is None

    def spent(self, seconds: float) -> None:
        """Take into account what a claim from the beginning took."""
        self.again_at = max(self.again_at, time.monotonic() + seconds / _SHARE_OF_RESTARTS)


@dataclass(eq=False)
class Column:
    """A column that is kept fresh; claims of it are made by one thread.

    ``backfill_at`` is when to look at the backfill, which is not heard of; ``caught_up_at`` when it
    was last noted that nothing new was pending.
    """

    rows: Rows
    encoder: TextEncoder
    cutter: Cutter | None = None
    cursors: dict[Class, Cursor] = field(default_factory=lambda: {0: Cursor(), 1: Cursor()})
    backfill_at: float = 0.0
    caught_up_at: float = 0.0

    @property
    def binding(self) -> Binding:
        """The binding."""
        return self.rows.binding

    @property
    def name(self) -> str:
        """Schema, table and column."""
        return str(self.rows.binding)


@dataclass(frozen=True, slots=True)
class Blocked:
    """A column that cannot be served now."""

    binding: Binding
    reason: str
    until: float


class Columns:
    """The columns of a worker, all where it names none; looked up again from time to time."""

    def __init__(self, columns: Collection[str | UUID], cache_rows: int = 0) -> None:
        self._names = tuple(columns)
        self._cache_rows = cache_rows
        self._lock = threading.Lock()
        self._served: dict[UUID, Column] = {}
        self._bindings: dict[UUID, Binding] = {}
        self._blocked: dict[UUID, Blocked] = {}

    def served(self, ids: Iterable[UUID] | None = None) -> list[Column]:
        """Columns that can be served, or those of them with these identities."""
        with self._lock:
            if ids is None:
                return list(self._served.values())
            return [self._served[i] for i in ids if i in self._served]

    def bindings(self) -> list[Binding]:
        """All columns that it is to serve, whether they can be served or not."""
        with self._lock:
            return list(self._bindings.values())

    def left(self, database: Database) -> int:
        """Rows that are pending, of all columns whose rows this role sees."""
        left = 0
        with database.begin() as connection:
            for binding in self.bindings():
                try:
                    with connection.begin_nested():
                        waiting = counts(connection, binding)
                except (BindingError, sa.exc.ProgrammingError):
                    continue  # Rows are hidden from this role, or columns gone: it is blocked.
                left += waiting.pending + waiting.backfill
        return left

    def blocked(self) -> dict[str, str]:
        """Columns that cannot be served, with the reason."""
        with self._lock:
            return {str(one.binding): one.reason for one in self._blocked.values()}

    def knows(self, ids: Iterable[UUID]) -> bool:
        """Whether all these columns are known."""
        with self._lock:
            return set(ids) <= self._bindings.keys()

    def block(self, binding: Binding, reason: str) -> None:
        """Leave a column alone for a while, and say so."""
        name = str(binding)
        with self._lock:
            before = self._blocked.get(binding.id)
            until = time.monotonic() + BLOCKED_FOR
            self._blocked[binding.id] = Blocked(binding, reason, until)
            self._served.pop(binding.id, None)
        if before is None or before.reason != reason:
            fields = {"column": name, "reason": reason, "retry_in": BLOCKED_FOR}
            say(logger, logging.ERROR, f"Cannot keep {name} fresh: {reason}", fields)

    def rescan(self, database: Database) -> None:
        """Look at the catalog again, and whether each column's queue is what it should be."""
        with database.begin() as connection:
            bindings = _chosen(catalog.all_bindings(connection), self._names)
            faults = {binding.id: queue_fault(connection, binding) for binding in bindings}
        for binding in bindings:
            fault = faults[binding.id]
            if fault is not None:
                self.block(binding, fault)
            elif not self._is_settled(binding):
                self._admit(database, binding)
        ids = faults.keys()
        with self._lock:
            self._bindings = {binding.id: binding for binding in bindings}
            self._served = {i: s for i, s in self._served.items() if i in ids}
            self._blocked = {i: b for i, b in self._blocked.items() if i in ids}

    def _is_settled(self, binding: Binding) -> bool:
        """Whether a column is served as it is now, or is to be left alone for a while."""
        served, blocked = self._served.get(binding.id), self._blocked.get(binding.id)
        if served is not None and _same(served.binding, binding):
            return True
        return (
            blocked is not None
            and blocked.until > time.monotonic()
            and _same(blocked.binding, binding)
        )

    def _admit(self, database: Database, binding: Binding) -> None:
        """Load the column's encoder and hold it against the column."""
        try:
            encoder = self._encoder(database, binding)
            with database.begin() as connection:
                rows = rows_of(connection, binding)
            cutter = None
            if rows.passages is not None:
                passages = self._encoder(database, rows.passages.binding)
                cutter = Cutter.of(database, rows, encoder, passages)
        except Exception as error:  # Whatever loading an encoder raises, the others go on.
            if isinstance(error, sa.exc.SQLAlchemyError) and fault_of(error) is not Fault.COLUMN:
                raise
            self.block(binding, words_of(error))
            return
        with self._lock:
            self._served[binding.id] = Column(rows, encoder, cutter)
            self._blocked.pop(binding.id, None)
        fields = {"column": str(binding), "encoder": encoder.spec.name}
        say(logger, logging.INFO, f"Keeping {binding} fresh", fields)

    def _encoder(self, database: Database, binding: Binding) -> TextEncoder:
        encoder, most = held_encoder(database, binding), self._cache_rows
        return CachedEncoder(encoder, database.engine, max_rows=most) if most else encoder


@dataclass(frozen=True, slots=True)
class Shared:
    """What the threads of one worker share."""

    database: Database
    settings: WorkerSettings
    tally: Tally
    columns: Columns


@dataclass(frozen=True, slots=True)
class Work:
    """Rows in hand, under the token of their lease, on their way through the worker."""

    column: Column
    token: str
    rows: tuple[Row, ...]


class Claimer:
    """Claims batches in one transaction and reads them in another; used by one thread.

    ``hold`` and ``drop`` are called with a lease's token, to renew it from now on, and no longer.
    """

    def __init__(
        self, shared: Shared, hold: Callable[[str], None], drop: Callable[[str], None]
    ) -> None:
        self._database = shared.database
        self._settings = shared.settings
        self._tally = shared.tally
        self._columns = shared.columns
        self._hold, self._drop = hold, drop
        self._numbers = itertools.count(1)
        self._abandoned: list[tuple[Column, str]] = []

    def claim(self, column: Column, class_: Class) -> tuple[Work | None, bool]:
        """The next batch of a class, and whether there may be more than that."""
        settings, cursor = self._settings, column.cursors[class_]
        started = time.monotonic()
        at_beginning = cursor.begin(1.0 if class_ == CHANGED else 60.0)

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

    def claim_again(self, column: Column, most: int) -> Work | None:
        """Rows that failed before, or were in hand when a process ended; see ``claims``."""

        def claim(connection: sa.Connection, token: str) -> list[Candidate]:
            return claims.claim_again(
                connection, column.rows, token=token, lease=self._settings.lease, most=most
            )

        return self._take(column, claim)[1]

    def look_for_ended(
        self, columns: Sequence[Column]
    ) -> tuple[list[tuple[Column, list[str]]], bool, bool]:
        """Rows that ended a process at each attempt, whether rows that were put off are in the
        queue again, and whether rows are due to be tried again.
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
                self._hold(token)
                with connection.begin():
                    column.rows.prepare(connection)
                    read = column.rows.read(connection, chosen)
        except sa.exc.SQLAlchemyError as error:
            self._drop(token)
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
        return chosen, Work(column, token, tuple(read))

    def _note_caught_up(self, column: Column) -> None:
        """Note that nothing new is pending, once a second at most."""
        now = time.monotonic()
        if now < column.caught_up_at + 1.0:
            return
        column.caught_up_at = now
        with self._database.begin() as connection:
            note_caught_up(connection, column.binding)


def _same(a: Binding, b: Binding) -> bool:
    names = ("relation", "schema", "table", "column", "expressions", "key_columns", "key_types")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _chosen(bindings: Sequence[Binding], columns: Sequence[str | UUID]) -> list[Binding]:
    if not columns:
        return list(bindings)
    chosen: dict[UUID, Binding] = {}
    for name in columns:
        matching = [b for b in bindings if b.id == name or name in names_of(b)]
        if not matching:
            known = ", ".join(str(b) for b in bindings) or "none"
            raise NotBoundError(
                f"No bound column is called {name!r}; name one as table, table.column or "
                f"schema.table.column. Bound columns: {known}."
            )
        chosen.update((binding.id, binding) for binding in matching)
    return list(chosen.values())


def names_of(binding: Binding) -> tuple[str, ...]:
    """What a bound column may be called in settings and on the command line."""
    table = f"{binding.schema}.{binding.table}"
    return (str(binding), f"{binding.table}.{binding.column}", table, binding.table)
