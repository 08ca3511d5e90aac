"""Which columns a worker keeps fresh, with their encoders, and which it cannot and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.catalog.holding import hold_encoder
from sbert_pg.errors import NotBoundError
from sbert_pg.pending.cache import cached
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import Fault, fault_of, words_of
from sbert_pg.pending.rows import Rows, rows_of
from sbert_pg.registry import get_encoder
from sbert_pg.spec import TextEncoder
from sbert_pg.worker.logs import LOGGER, say

logger = logging.getLogger(LOGGER)

#: Seconds after which a column that could not be served is tried again.
BLOCKED_FOR = 60.0


@dataclass(frozen=True)
class Served:
    """A column that is kept fresh."""

    rows: Rows
    encoder: TextEncoder

    @property
    def id(self) -> int:
        """Number of the binding."""
        return self.rows.binding.id

    @property
    def name(self) -> str:
        """Schema, table and column."""
        return str(self.rows.binding)


@dataclass(frozen=True, slots=True)
class Blocked:
    """A column that cannot be served now."""

    name: str
    reason: str
    until: float


class Serving:
    """The columns of a worker; looked up again from time to time.

    Args:
        wanted: names of columns; all where it is empty.
        cache_rows: vectors kept in the cache of the database; 0 for no cache.
    """

    def __init__(self, wanted: Sequence[str], cache_rows: int = 0) -> None:
        self._wanted = tuple(wanted)
        self._cache_rows = cache_rows
        self._lock = threading.Lock()
        self._served: dict[int, Served] = {}
        self._bindings: dict[int, Binding] = {}
        self._blocked: dict[int, Blocked] = {}

    def columns(self, ids: Iterable[int] | None = None) -> list[Served]:
        """Columns that can be served, or those of them with these numbers."""
        now = time.monotonic()
        with self._lock:
            wanted = self._served.keys() if ids is None else self._served.keys() & set(ids)
            return [
                self._served[i]
                for i in sorted(wanted)
                if i not in self._blocked or self._blocked[i].until <= now
            ]

    def ids(self) -> list[int]:
        """Numbers of all columns that are wanted."""
        with self._lock:
            return sorted(self._bindings)

    def blocked(self) -> dict[str, str]:
        """Columns that cannot be served, with the reason."""
        with self._lock:
            return {blocked.name: blocked.reason for blocked in self._blocked.values()}

    def knows(self, ids: Iterable[int]) -> bool:
        """Whether all these columns are known."""
        with self._lock:
            return set(ids) <= self._bindings.keys()

    def block(self, binding_id: int, name: str, error: BaseException) -> None:
        """Leave a column alone for a while, and say so."""
        reason = words_of(error)
        with self._lock:
            before = self._blocked.get(binding_id)
            until = time.monotonic() + BLOCKED_FOR
            self._blocked[binding_id] = Blocked(name, reason, until)
            self._served.pop(binding_id, None)
        if before is None or before.reason != reason:
            fields = {"column": name, "reason": reason, "retry_in": BLOCKED_FOR}
            say(logger, logging.ERROR, f"Cannot keep {name} fresh: {reason}", fields)

    def rescan(self, database: Database) -> None:
        """Look at the catalog again.

        Raises:
            NotBoundError: a wanted column is not bound.
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        with database.begin() as connection:
            bindings = _wanted(catalog.all_bindings(connection), self._wanted)
        for binding in bindings:
            known = self._served.get(binding.id)
            blocked = self._blocked.get(binding.id)
            if known is not None and _same(known.rows.binding, binding):
                continue
            if blocked is not None and blocked.until > time.monotonic():
                continue
            self._admit(database, binding)
        ids = {binding.id for binding in bindings}
        with self._lock:
            self._bindings = {binding.id: binding for binding in bindings}
            self._served = {i: s for i, s in self._served.items() if i in ids}
            self._blocked = {i: b for i, b in self._blocked.items() if i in ids}

    def _admit(self, database: Database, binding: Binding) -> None:
        """Load the column's encoder and hold it against the column."""
        try:
            encoder = get_encoder(binding.declared)
            with database.begin() as connection:
                hold_encoder(connection, binding, encoder)
                rows = rows_of(connection, binding)
            encoder = cached(encoder, database.engine, self._cache_rows)
        except Exception as error:  # Whatever loading an encoder raises, the others go on.
            if isinstance(error, sa.exc.SQLAlchemyError) and fault_of(error) is not Fault.COLUMN:
                raise
            self.block(binding.id, str(binding), error)
            return
        with self._lock:
            self._served[binding.id] = Served(rows, encoder)
            self._blocked.pop(binding.id, None)
        fields = {"column": str(binding), "encoder": encoder.spec.name}
        say(logger, logging.INFO, f"Keeping {binding} fresh", fields)


def _same(a: Binding, b: Binding) -> bool:
    """Whether everything that statements are made of is still the same."""
    names = ("relation", "schema", "table", "column", "source", "key_columns", "key_types")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _wanted(bindings: Sequence[Binding], names: Sequence[str]) -> list[Binding]:
    if not names:
        return list(bindings)
    found: list[Binding] = []
    for name in names:
        matching = [b for b in bindings if name in (str(b), f"{b.table}.{b.column}")]
        if not matching:
            known = ", ".join(str(b) for b in bindings) or "none"
            raise NotBoundError(
                f"No bound column is called {name!r}; name one as table.column or "
                f"schema.table.column. Bound columns: {known}."
            )
        found += [binding for binding in matching if binding not in found]
    return found


__all__ = ["Blocked", "Served", "Serving"]
