"""Which columns a worker keeps fresh, with their encoders, and which it cannot and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.errors import NotBoundError
from sbert_pg.freshness.cutting import Cutter
from sbert_pg.freshness.database import Database
from sbert_pg.freshness.encoding import cached
from sbert_pg.freshness.keys import CHANGED, Class, Key
from sbert_pg.freshness.rows import Rows, rows_of
from sbert_pg.freshness.settings import LOGGER, Tally, WorkerSettings, say
from sbert_pg.freshness.status import queue_fault
from sbert_pg.passages.chunker import chunker_of
from sbert_pg.probes import measured
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder
from sbert_pg.sqlstates import Fault, fault_of, words_of

logger = logging.getLogger(LOGGER)

#: Seconds after which a column that could not be served is tried again.
BLOCKED_FOR = 60.0
#: A claim from the queue's beginning reads past what was done since the last vacuum, so it may take
#: this share of the time.
_SHARE_OF_RESTARTS = 0.05


@dataclass(slots=True)
class Cursor:
    """Where the next claim of a class begins, so that claims of a long queue stay equally fast.

    Attributes:
        after: key of the last row that was claimed; ``None`` for the beginning of the queue.
        again_at: when claims begin at the beginning again, for what is new before ``after``.
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

    Attributes:
        cutter: what cuts its rows, where they are documents with passages.
        cursors: where claims go on, by class.
        backfill_at: when to look at the backfill, which is not heard of.
        caught_up_at: when it was last noted that nothing new was pending.
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

    def begin(self, class_: Class) -> bool:
        """Whether a claim begins at the beginning of the queue."""
        return self.cursors[class_].begin(1.0 if class_ == CHANGED else 60.0)


@dataclass(frozen=True, slots=True)
class Blocked:
    """A column that cannot be served now."""

    binding: Binding
    reason: str
    until: float


class Columns:
    """The columns of a worker; looked up again from time to time.

    Args:
        wanted: names or identities of columns; all where it is empty.
        cache_rows: vectors kept in the cache of the database; 0 for no cache.
    """

    def __init__(self, wanted: Collection[str | UUID], cache_rows: int = 0) -> None:
        self._wanted = tuple(wanted)
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
        """All columns that are wanted, whether they can be served or not."""
        with self._lock:
            return list(self._bindings.values())

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
        """Look at the catalog again, and whether each column's queue is what it should be.

        Raises:
            NotBoundError: a wanted column is not bound.
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        with database.begin() as connection:
            bindings = _chosen(catalog.all_bindings(connection), self._wanted)
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
            encoder = get_encoder(binding.declared)
            # What it takes to encode the probes is not spent in a transaction.
            measured(encoder)
            with database.begin() as connection:
                hold_encoder(connection, binding, encoder)
                rows = rows_of(connection, binding)
            encoder = cached(encoder, database.engine, self._cache_rows)
            cutter = None if rows.passages is None else self._cutter(database, rows, encoder)
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

    def _cutter(self, database: Database, rows: Rows, encoder: TextEncoder) -> Cutter:
        """What cuts documents, with the encoder of their passages."""
        stored = rows.passages
        assert stored is not None
        own = stored.binding.declared
        passage_encoder = get_encoder(own)
        measured(passage_encoder)
        with database.begin() as connection:
            hold_encoder(connection, stored.binding, passage_encoder)
        return Cutter(
            database,
            rows,
            chunker_of(stored.settings["chunker"]),
            get_encoder(stored.settings["encoder"]),
            encoder,
            cached(passage_encoder, database.engine, self._cache_rows),
        )


@dataclass(frozen=True, slots=True)
class Shared:
    """What the threads of one worker share.

    Attributes:
        settings: the worker's.
        tally: where everything is counted.
        columns: the columns that it keeps fresh.
    """

    database: Database
    settings: WorkerSettings
    tally: Tally
    columns: Columns


def _same(a: Binding, b: Binding) -> bool:
    """Whether everything that statements are made of is still the same."""
    names = ("relation", "schema", "table", "column", "expressions", "key_columns", "key_types")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _chosen(bindings: Sequence[Binding], wanted: Sequence[str | UUID]) -> list[Binding]:
    if not wanted:
        return list(bindings)
    chosen: dict[UUID, Binding] = {}
    for name in wanted:
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
