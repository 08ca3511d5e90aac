"""Hold the code's encoder against the column's binding, and attest it to the database's own guard.

A statement that stores a vector in an embedding column, or compares one with it, is looked at just
before it is executed. What it does to which column is worked out once for each compiled statement;
whether the encoder is the column's is asked once for each engine and column, so that a search costs
a lookup in a dictionary. Before the first write of a transaction the writer's encoder is attested,
since triggers refuse vectors that nobody vouches for.

The listener is put on the engine's dialect when the engine first uses a vector parameter; no engine
that does not is touched. It also teaches older connections to send vectors in binary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from psycopg.adapt import AdaptersMap
from sqlalchemy import event
from sqlalchemy.engine import Connection, Dialect, Transaction

from sbert_pg.registry import guards
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import wire

#: Remembered of a connection.
_TAUGHT = "sbert_pg.taught"
#: Seconds after which a column that was found unbound is looked at again.
UNBOUND_RECHECK = 30.0


class ColumnIdentity(NamedTuple):
    """A column as the database names it; ``schema`` is ``None`` for the search path's."""

    schema: str | None
    table: str
    column: str

    def __str__(self) -> str:
        return ".".join(part for part in self if part is not None)


#: Raises ``EncoderMismatchError``; returns whether the column is bound, which makes it final, or
#: ``None`` where it is bound and the answer is not final, since the transaction that sealed it may
#: still be rolled back.
Check = Callable[[Connection, ColumnIdentity, EncoderSpec], "bool | None"]
#: Vouches for a bound column's encoder until the transaction or savepoint ends; returns the events,
#: ``INSERTING`` and ``UPDATING`` in one number, on which triggers of the table may rewrite a row.
Attest = Callable[[Connection, ColumnIdentity, EncoderSpec], "int | None"]
#: Events of a trigger, as the bits of ``pg_trigger.tgtype``.
INSERTING = 4
UPDATING = 16

_check: Check | None
_attest: Attest | None
_check, _attest = guards()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Use:
    """That a statement reads or writes an embedding column."""

    identity: ColumnIdentity
    spec: EncoderSpec
    #: Names of the parameters that are stored, none where the column is only compared with.
    stored: tuple[str, ...] = ()


_Key = tuple[ColumnIdentity, EncoderSpec]
_Table = tuple[str | None, str]


class _Watched:
    """What has been learned on one dialect, that is, on one engine."""

    def __init__(self) -> None:
        self.listening = False
        self.uses: WeakKeyDictionary[Any, tuple[_Use, ...]] = WeakKeyDictionary()
        self.bound: set[_Key] = set()
        self.unbound: dict[_Key, float] = {}
        #: What holds until a transaction or savepoint ends.
        self.answers: WeakKeyDictionary[Transaction, dict[_Key, bool]] = WeakKeyDictionary()
        self.attested: WeakKeyDictionary[Transaction, set[_Key]] = WeakKeyDictionary()
        #: By outermost transaction, what the last attestation said of a table's triggers.
        self.rewriting: WeakKeyDictionary[Transaction, dict[_Table, int]] = WeakKeyDictionary()


_watched: WeakKeyDictionary[Dialect, _Watched] = WeakKeyDictionary()


def set_guards(check: Check | None, attest: Attest | None) -> None:
    """Set what asks the catalog, for the life of the process; see ``registry.set_guards``.

    Args:
        check: compares a declaration with the catalog.
        attest: vouches for a writer in the running transaction.
    """
    global _check, _attest
    _check, _attest = check, attest


def identity_of(column: sa.ColumnElement[Any]) -> ColumnIdentity | None:
    """The table column behind an expression, through aliases and subqueries, where there is one."""
    for base in column.base_columns:
        table = getattr(base, "table", None)
        if isinstance(table, sa.Table):
            return ColumnIdentity(table.schema, table.name, str(getattr(base, "name", "")))
    return None


def watch(dialect: Dialect) -> None:
    """Look at the statements of this dialect from now on."""
    known = _watched.get(dialect)
    if known is not None and known.listening:
        return
    with _lock:
        if dialect in _watched:
            return
        made = _watched[dialect] = _Watched()
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(dialect, name, _before_execute)
        # Last: a thread that sees it goes on to execute, and must not find half of the listeners.
        made.listening = True


def forget(dialect: Dialect) -> None:
    """Ask about every column again at its next use, as after a change of bindings."""
    watched = _watched.get(dialect)
    if watched is not None:
        watched.bound.clear()
        watched.unbound.clear()
        watched.answers.clear()
        watched.attested.clear()
        watched.rewriting.clear()


def ensure(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> bool:
    """Check one column now, unless it has been; for readers that do not go through a statement.

    Returns:
        Whether the column is bound.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    if _check is None:
        return False
    watch(connection.dialect)
    return _is_bound(_watched[connection.dialect], connection, (identity, spec), False)


def ensure_writable(connection: Connection, identity: ColumnIdentity, spec: EncoderSpec) -> None:
    """Check one column and vouch for its encoder; for writers that do not go through a statement.

    Raises:
        EncoderMismatchError: the column belongs to another encoder.
    """
    if _check is None:
        return
    watch(connection.dialect)
    watched, key = _watched[connection.dialect], (identity, spec)
    if _is_bound(watched, connection, key, True):
        _vouch(watched, connection, key)


def _is_bound(watched: _Watched, connection: Connection, key: _Key, writes: bool) -> bool:
    """Whether a column is bound, to the encoder that the code declares.

    That it is not bound is taken from memory for a while where it is read, and for one transaction
    where it is written, since a trigger refuses what is not attested.
    """
    if key in watched.bound:
        return True
    scopes = _scopes(connection)
    for scope in scopes:
        known = watched.answers.get(scope, {}).get(key)
        if known is not None:
            return known
    now = time.monotonic()
    if not writes and now - watched.unbound.get(key, -UNBOUND_RECHECK) < UNBOUND_RECHECK:
        return False
    answer = _check(connection, *key) if _check is not None else False
    if answer:
        watched.bound.add(key)
        watched.unbound.pop(key, None)
        return True
    bound = answer is None
    if not bound:
        watched.unbound[key] = now
    if scopes and (bound or writes):
        watched.answers.setdefault(scopes[-1], {})[key] = bound
    return bound


def _vouch(watched: _Watched, connection: Connection, key: _Key) -> None:
    """Attest once in a transaction; a savepoint rolled back takes its attestations along."""
    scopes = _scopes(connection)
    if _attest is None:
        return
    # Under autocommit an attestation ends with what is committed next, which is not seen here.
    alone = getattr(connection.connection.dbapi_connection, "autocommit", False)
    if not alone and any(key in watched.attested.get(scope, ()) for scope in scopes):
        return
    _attest_one(watched, connection, key)
    if scopes:
        watched.attested.setdefault(scopes[-1], set()).add(key)


def _attest_one(watched: _Watched, connection: Connection, key: _Key) -> None:
    events = _attest(connection, *key) if _attest is not None else None
    transaction = connection.get_transaction()
    if transaction is not None:
        table = (key[0].schema, key[0].table)
        watched.rewriting.setdefault(transaction, {})[table] = events or 0


def may_rewrite(connection: Connection, table: sa.Table, events: int) -> bool:
    """Whether triggers may have rewritten rows that this transaction has written with vectors.

    Args:
        connection: the connection that wrote them, in the same transaction.
        table: the table.
        events: ``INSERTING``, ``UPDATING`` or both.

    Returns:
        Whether the table, or a partition, has a ``BEFORE`` row trigger for such an event. ``False``
        where the table is not bound, or the transaction has not vouched for a vector of it.
    """
    watched, transaction = _watched.get(connection.dialect), connection.get_transaction()
    if watched is None or transaction is None:
        return False
    known = watched.rewriting.get(transaction, {})
    return bool(known.get((table.schema, table.name), 0) & events)


def _scopes(connection: Connection) -> list[Transaction]:
    """The transaction and the innermost savepoint, where there are such."""
    scopes = (connection.get_transaction(), connection.get_nested_transaction())
    return [scope for scope in scopes if scope is not None]


def _before_execute(cursor: Any, statement: str, *rest: Any) -> bool | None:
    context = rest[-1]
    _teach(context.root_connection.connection, cursor)
    compiled = getattr(context, "compiled", None)
    if compiled is None or _check is None or context.isddl:
        return None
    watched = _watched[context.dialect]
    uses = watched.uses.get(compiled)
    if uses is None:
        uses = watched.uses[compiled] = tuple(_uses(compiled))
    if not uses:
        return None
    connection = context.root_connection
    writes = []
    for use in uses:
        if use.stored and not _stores(context.compiled_parameters, use.stored):
            continue
        key = (use.identity, use.spec)
        if _is_bound(watched, connection, key, bool(use.stored)) and use.stored:
            writes.append(key)
    if not writes:
        return None
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        _execute_alone(writes, cursor, statement, rest)
        return True
    for key in writes:
        _vouch(watched, connection, key)
    return None


def _teach(connection: Any, cursor: Any) -> None:
    """Let a connection that was opened before any vector type existed send vectors in binary.

    An engine is often made, and connected, before the module with the mapped classes is imported,
    and a connection keeps what its driver knew when it was opened.
    """
    if _TAUGHT in connection.info:
        return
    connection.info[_TAUGHT] = True
    # An asynchronous engine's cursor has the driver's inside.
    for place in (connection.driver_connection, getattr(cursor, "_cursor", cursor)):
        adapters = getattr(place, "adapters", None)
        if isinstance(adapters, AdaptersMap):
            wire.register(adapters)


def _stores(parameters: Sequence[dict[str, Any]], names: tuple[str, ...]) -> bool:
    return any(row.get(name) is not None for row in parameters for name in names)


def _execute_alone(
    writes: Sequence[_Key], cursor: Any, statement: str, rest: tuple[Any, ...]
) -> None:
    """Execute one statement of an autocommit connection together with its attestation.

    An attestation ends with its transaction, and under autocommit that is the attestation itself.
    So the two share a transaction, which commits at once as the statement would have.
    """
    context = rest[-1]
    connection = context.root_connection
    aside = connection.connection.cursor()
    aside.execute("BEGIN")
    try:
        for key in writes:
            _attest_one(_watched[connection.dialect], connection, key)
        if len(rest) == 1:
            context.dialect.do_execute_no_params(cursor, statement, context)
        elif isinstance(rest[0], (list, tuple)) and context.executemany:
            context.dialect.do_executemany(cursor, statement, rest[0], context)
        else:
            context.dialect.do_execute(cursor, statement, rest[0], context)
    except BaseException:
        aside.execute("ROLLBACK")
        raise
    aside.execute("COMMIT")
    aside.close()


def _uses(compiled: Any) -> Iterator[_Use]:
    """Columns that the statement's parameters are compared with or stored in."""
    compared = {
        _Use(bind.type.column, bind.type.encoder)
        for bind in compiled.binds.values()
        if isinstance(getattr(bind.type, "column", None), ColumnIdentity)
    }
    yield from compared
    if not (compiled.isinsert or compiled.isupdate):
        return
    table = compiled.compile_state.dml_table
    for column in getattr(table, "columns", ()):
        spec = getattr(column.type, "encoder", None)
        if spec is None:
            continue
        stored = tuple(name for name, bind in compiled.binds.items() if bind.type is column.type)
        if stored:
            yield _Use(ColumnIdentity(table.schema, table.name, column.name), spec, stored)
