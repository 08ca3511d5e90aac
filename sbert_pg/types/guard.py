"""Hold the code's encoder against the column's binding, once per engine and column.

A statement that stores a vector in an embedding column, or compares one with it, is looked at just
before its first execution. From then on the check is a lookup of the compiled statement in a set.
The listener is put on the engine's dialect when the engine first uses an embedding parameter; no
engine that does not is touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect

from sbert_pg.spec import EncoderSpec

#: Seconds after which a column that was found unbound is looked at again.
UNBOUND_RECHECK = 30.0


class ColumnIdentity(NamedTuple):
    """A column as the database names it; ``schema`` is ``None`` for the search path's."""

    schema: str | None
    table: str
    column: str

    def __str__(self) -> str:
        return ".".join(part for part in self if part is not None)


#: Raises ``EncoderMismatchError``; returns whether the column is bound, so that the answer is final.
Check = Callable[[Connection, ColumnIdentity, EncoderSpec], bool]

_check: Check | None = None
_lock = threading.Lock()


class _Watched:
    """What has been checked on one dialect, that is, on one engine."""

    def __init__(self) -> None:
        self.statements: WeakSet[Any] = WeakSet()
        self.bound: set[tuple[ColumnIdentity, EncoderSpec]] = set()
        self.unbound: dict[tuple[ColumnIdentity, EncoderSpec], float] = {}


_watched: WeakKeyDictionary[Dialect, _Watched] = WeakKeyDictionary()


def set_check(check: Check | None) -> None:
    """Set what compares a declaration with the catalog; ``sbert_pg/__init__.py`` joins the two."""
    global _check
    _check = check


def identity_of(column: sa.ColumnElement[Any]) -> ColumnIdentity | None:
    """The table column behind an expression, through aliases and subqueries, where there is one."""
    for base in column.base_columns:
        table = getattr(base, "table", None)
        if isinstance(table, sa.Table):
            return ColumnIdentity(table.schema, table.name, str(getattr(base, "name", "")))
    return None


def watch(dialect: Dialect) -> None:
    """Check the statements of this dialect from now on."""
    if dialect in _watched:
        return
    with _lock:
        if dialect in _watched:
            return
        _watched[dialect] = _Watched()
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(dialect, name, _before_execute)


def forget(dialect: Dialect) -> None:
    """Check every column again at its next use, as after a change of bindings."""
    watched = _watched.get(dialect)
    if watched is not None:
        watched.statements.clear()
        watched.bound.clear()
        watched.unbound.clear()


def ensure(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> None:
    """Check one column now, unless it has been; for writers that do not go through a statement.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    if _check is None:
        return
    dialect = connection.dialect
    watch(dialect)
    _ensure(_watched[dialect], connection, identity, spec, _check)


def _ensure(
    watched: _Watched,
    connection: Connection,
    identity: ColumnIdentity,
    spec: EncoderSpec,
    check: Check,
) -> bool:
    key = (identity, spec)
    if key in watched.bound:
        return True
    now = time.monotonic()
    if now - watched.unbound.get(key, -UNBOUND_RECHECK) < UNBOUND_RECHECK:
        return False
    if check(connection, identity, spec):
        watched.bound.add(key)
        watched.unbound.pop(key, None)
        return True
    watched.unbound[key] = now
    return False


def _before_execute(*arguments: Any) -> None:
    context = arguments[-1]
    compiled = getattr(context, "compiled", None)
    if compiled is None or _check is None:
        return
    watched = _watched[context.dialect]
    if compiled in watched.statements:
        return
    uses = set(_uses(compiled))
    if all([_ensure(watched, context.root_connection, *use, _check) for use in uses]):
        watched.statements.add(compiled)


def _uses(compiled: Any) -> Iterator[tuple[ColumnIdentity, EncoderSpec]]:
    """Columns that the statement's parameters are stored in or compared with."""
    for bind in compiled.binds.values():
        column = getattr(bind.type, "column", None)
        if isinstance(column, ColumnIdentity):
            yield column, bind.type.encoder
    if not (compiled.isinsert or compiled.isupdate):
        return
    table = compiled.compile_state.dml_table
    for column in getattr(table, "columns", ()):
        spec = getattr(column.type, "encoder", None)
        if spec is not None and any(bind.type is column.type for bind in compiled.binds.values()):
            yield ColumnIdentity(table.schema, table.name, column.name), spec
