"""The server as this package uses it: catalogs, names, settings, and locks on tables in use.

A statement that waits for ``ACCESS EXCLUSIVE`` makes every later reader and writer of the table
wait behind it. So DDL waits a moment only, gives way, and tries again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, OID
from sqlalchemy.ext.compiler import compiles

from sbert_pg.errors import DeclarationError, TableBusyError
from sbert_pg.source import NOT_STORED, UNSTORABLE
from sbert_pg.sqlstates import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, sqlstate_of

T = TypeVar("T")


def stored_table(schema: str, name: str, **types: Any) -> sa.TableClause:
    """A table or view as far as it is read: its columns with their types."""
    columns: list[Any] = [sa.column(column, type_) for column, type_ in types.items()]
    return sa.table(name, *columns, schema=schema)


_catalog = partial(stored_table, "pg_catalog")


_O, _T, _I, _B, _TS = OID, sa.Text, sa.BigInteger, sa.Boolean, sa.DateTime(timezone=True)

CLASS = _catalog(
    "pg_class", oid=_O, relname=_T, relnamespace=_O, relam=_O, reloptions=ARRAY(_T),
    reltuples=sa.Float, relkind=_T, reltablespace=_O,
)  # fmt: skip
NAMESPACE = _catalog("pg_namespace", oid=_O, nspname=_T)
AM = _catalog("pg_am", oid=_O, amname=_T)
INDEX = _catalog(
    "pg_index", indexrelid=_O, indrelid=_O, indisvalid=_B, indisready=_B, indclass=_T, indpred=_T,
    indkey=_T,
)  # fmt: skip
TABLESPACE = _catalog("pg_tablespace", oid=_O, spcname=_T)
OPCLASS = _catalog("pg_opclass", oid=_O, opcname=_T)
ATTRIBUTE = _catalog(
    "pg_attribute", attrelid=_O, attname=_T, attnum=_I, atttypmod=_I, atttypid=_O, attisdropped=_B,
    attnotnull=_B,
)  # fmt: skip
TYPE = _catalog("pg_type", oid=_O, typname=_T, typtype=_T, typcategory=_T, typbasetype=_O)
INHERITS = _catalog("pg_inherits", inhrelid=_O, inhparent=_O)
EXTENSION = _catalog("pg_extension", extname=_T, extversion=_T)
CONSTRAINT = _catalog("pg_constraint", conrelid=_O, confrelid=_O, contype=_T)
DEPEND = _catalog("pg_depend", classid=_O, objid=_O, refclassid=_O, refobjid=_O, refobjsubid=_I)
INDEX_STATISTICS = _catalog("pg_stat_user_indexes", indexrelid=_O, idx_scan=_I, last_idx_scan=_TS)
ACTIVITY = _catalog(
    "pg_stat_activity", pid=_I, datname=_T, usename=_T, application_name=_T, state=_T, query=_T,
    xact_start=_TS, query_start=_TS, backend_type=_T, wait_event_type=_T,
)  # fmt: skip
LOCKS = _catalog("pg_locks", pid=_I, relation=_O, granted=_B, mode=_T)
DICTIONARY = _catalog("pg_ts_dict", oid=_O, dictname=_T, dictnamespace=_O)
REPLICATION = _catalog("pg_stat_replication", pid=_I, state=_T, replay_lag=sa.Interval)
INDEX_PROGRESS = _catalog(
    "pg_stat_progress_create_index", pid=_I, relid=_O, index_relid=_O, phase=_T, blocks_total=_I,
    blocks_done=_I, tuples_total=_I, tuples_done=_I,
)  # fmt: skip


class ColumnIdentity(NamedTuple):
    """A column as the database names it; ``schema`` is ``None`` for the search path's."""

    schema: str | None
    table: str
    column: str

    def __str__(self) -> str:
        return ".".join(part for part in self if part is not None)


def identity_behind(column: sa.ColumnElement[Any]) -> ColumnIdentity | None:
    """The table column behind an expression, through aliases and subqueries, where there is one."""
    for base in column.base_columns:
        table = getattr(base, "table", None)
        if isinstance(table, sa.Table):
            return ColumnIdentity(table.schema, table.name, str(getattr(base, "name", "")))
    return None


def identity_of(column: ColumnIdentity | sa.Column[Any]) -> ColumnIdentity:
    """Schema, table and column of a column of a table."""
    if isinstance(column, ColumnIdentity):
        return _required(column)
    table = getattr(column, "table", None)
    if table is None or not hasattr(table, "name"):
        raise DeclarationError(
            f"{column!r} is not a column of a table; pass Article.__table__.c.embedding or a "
            "ColumnIdentity(schema, table, column)."
        )
    return _required(ColumnIdentity(getattr(table, "schema", None), table.name, column.name))


def _required(identity: ColumnIdentity) -> ColumnIdentity:
    for name in identity:
        if name is not None and UNSTORABLE.search(name):
            raise DeclarationError(f"A column is named {name!r}, {NOT_STORED}")
    return identity


#: Writes SQL that no driver reads: for people, scripts and the server's own definitions. A driver's
#: dialect may double percent signs.
PLAIN = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]


def array(values: Iterable[Any], type_: Any = sa.Text) -> sa.ColumnElement[Any]:
    """Values as one parameter: a statement has 65,535 at most."""
    return sa.cast(sa.literal([*values], ARRAY(type_)), ARRAY(type_))


def unnested(
    name: str, ordinality: str | None = None, /, **arrays: sa.ColumnElement[Any]
) -> sa.TableValuedAlias:
    """Arrays as columns of a table of that name; ``ordinality`` is a column of the row's number."""
    columns: list[Any] = [
        sa.column(column, getattr(each.type, "item_type", None)) for column, each in arrays.items()
    ]
    rows = sa.func.unnest(*arrays.values())
    return rows.table_valued(*columns, with_ordinality=ordinality, name=name).render_derived()


def array_label(columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[str]:
    """What leases and failures call a row: its key as text, a JSON array."""
    return sa.cast(sa.func.jsonb_build_array(*(sa.cast(c, sa.Text) for c in columns)), sa.Text)


def array_of(parts: Iterable[Any]) -> str:
    """What ``array_label`` gives for a row whose key has these parts."""
    return json.dumps([str(part) for part in parts], ensure_ascii=False)


def parts_of(label: str) -> list[Any] | None:
    """The parts of a key that an array names; ``None`` of any other text."""
    try:
        parts = json.loads(label)
    except ValueError:
        return None
    return parts if isinstance(parts, list) else None


def oid_of(relation: str) -> sa.ColumnElement[int]:
    """The oid of a table given as text, quoted where it has to be; ``NULL`` where there is none."""
    return sa.cast(sa.func.to_regclass(relation), OID)


def stored_types(connection: sa.Connection, relation: str | int) -> dict[str, Any]:
    """Of each column of a table, by text or oid, some of its attribute and the row of its type."""
    a, type_ = ATTRIBUTE.c, sa.func.format_type(ATTRIBUTE.c.atttypid, None, type_=sa.Text)
    oid = oid_of(relation) if isinstance(relation, str) else relation
    statement = (
        sa.select(a.attname, a.atttypmod, a.attnotnull, type_.label("type"), *TYPE.c)
        .join(TYPE, TYPE.c.oid == a.atttypid)
        .where(a.attrelid == oid, sa.not_(a.attisdropped))
    )
    return {row.attname: row for row in connection.execute(statement)}


def name_of(schema: str | None, table: str) -> str:
    """A table's name as text that ``to_regclass`` reads, every part quoted."""
    # Not format_table, which doubles percents for the driver: this is data, not SQL.
    return ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table) if part)


def schema_in(connection: sa.Connection, schema: str | None) -> str | None:
    """The schema that a connection's ``schema_translate_map`` makes of one."""
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    translated: str | None = schemas.get(schema, schema)
    return translated


def name_in(connection: sa.Connection, schema: str | None, table: str) -> str:
    """As ``name_of``, in the schema that a connection's ``schema_translate_map`` makes of one."""
    return name_of(schema_in(connection, schema), table)


def require_connection(function: str, connection: Any, *, or_engine: bool = False) -> None:
    """Refuse an engine, or what is asynchronous, where a connection or a session is expected."""
    # sync_engine and sync_session are what an asynchronous engine, connection or session has.
    asynchronous = hasattr(connection, "sync_engine") or hasattr(connection, "sync_session")
    if asynchronous or (isinstance(connection, sa.Engine) and not or_engine):
        name = type(connection).__name__
        raise DeclarationError(
            f"{function}() takes a connection, and got {name}. Open one by 'with engine.begin() as "
            f"connection'; asynchronous code calls 'await connection.run_sync({function}, ...)'."
        )


def require_engine(what: str, engine: Any) -> None:
    """Refuse what is no synchronous engine."""
    if not isinstance(engine, sa.Engine):
        raise DeclarationError(
            f"{what} needs a synchronous engine, and got {type(engine).__name__}. Create one with "
            "sqlalchemy.create_engine('postgresql+psycopg://...')."
        )


def written_name(schema: str | None, name: str) -> str:
    """A table or index as psql reads it, quoted where it has to be."""
    return PLAIN.identifier_preparer.format_table(sa.table(name, schema=schema))


def ddl_name(compiler: Any, schema: str | None, name: str) -> str:
    """A table or index given by its names, as a part of a statement that is being compiled."""
    table = sa.Table(name, sa.MetaData(), schema=schema or None)
    formatted: str = compiler.preparer.format_table(table)
    return formatted


class Statement(sa.schema.ExecutableDDLElement):
    """DDL that SQLAlchemy has no construct for, as a function of the compiler; see ``ddl_name``."""

    # Not ``sa.DDL``, which doubles the percent signs of a name that the compiler has doubled.
    def __init__(self, write: Callable[[Any], str]) -> None:
        self.write = write


@compiles(Statement)
def _write(element: Statement, compiler: Any, **_: Any) -> str:
    return element.write(compiler)


def ddl(statement: str, table: sa.Table) -> Statement:
    """A statement about a table, which is ``%(fullname)s`` in it."""
    return Statement(lambda c: statement % {"fullname": c.preparer.format_table(table)})


#: Seconds that DDL waits for a lock before it gives way to those who queue behind it.
LOCK_TIMEOUT = 1.0
#: Attempts before the step is given up; with the pauses between them about two minutes.
ATTEMPTS = 40
#: What a role or database may have for web requests, and would end a step that takes its time; a
#: shorter one than the lock's would also hide that it was the lock that was waited for.
_TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
)


def _is_locked(error: sa.exc.DBAPIError) -> bool:
    return sqlstate_of(error) in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED)


def retried(
    attempt: Callable[[], T],
    *,
    again: Callable[[sa.exc.DBAPIError], bool] = _is_locked,
    busy: Callable[[], str] | None = None,
    attempts: int = ATTEMPTS,
) -> T:
    """Call a function again after some errors: by default where its lock cannot be had.

    At last the error is raised, or ``TableBusyError(busy())``.
    """
    pause = Pause(0.2, 3.0)
    while True:
        attempts -= 1
        try:
            return attempt()
        except sa.exc.DBAPIError as error:
            if not again(error) or (attempts < 1 and busy is None):
                raise
            if attempts < 1 and busy is not None:
                raise TableBusyError(busy()) from error
        pause.sleep()


def in_short_transactions(
    engine: sa.Engine,
    step: Callable[[sa.Connection], T],
    *,
    relation: str | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> T:
    """Run a step, again where a lock cannot be had, in a transaction that never waits long for one.

    Other time-outs than the lock's, of a role or database, are set aside meanwhile. ``relation`` is
    the table that it locks, as text for ``to_regclass``, for the message of ``TableBusyError``.
    """

    def attempt() -> T:
        with engine.begin() as connection:
            set_timeouts_aside(connection)
            configure(connection, {"lock_timeout": milliseconds(lock_timeout)})
            return step(connection)

    def busy() -> str:
        with engine.connect() as connection:
            return busy_message(connection, relation, attempts, lock_timeout)

    return retried(attempt, busy=busy, attempts=attempts)


def milliseconds(seconds: float) -> str:
    """A time-out as the server's settings spell it."""
    return f"{round(seconds * 1000)}ms"


def configure(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Server settings until the transaction ends."""
    _set(connection, values, local=True)


def set_timeouts_aside(connection: sa.Connection) -> None:
    """Set the time-outs that a role or database may have aside until the transaction ends."""
    known = sa.table("pg_settings", sa.column("name", sa.Text), schema="pg_catalog")
    statement = sa.select(sa.func.set_config(known.c.name, "0", True))
    connection.execute(statement.where(known.c.name.in_(_TIMEOUTS))).all()


@contextmanager
def settings(connection: sa.Connection, values: Mapping[str, str]) -> Iterator[None]:
    """Server settings of the session for a while; it has its own again afterwards."""
    before = {
        name: connection.execute(sa.select(sa.func.current_setting(name))).scalar_one()
        for name in values
    }
    _set(connection, values)
    try:
        yield
    finally:
        # A transaction that has failed takes its settings with it.
        if not connection.invalidated and not _failed(connection):
            _set(connection, before)


def _set(connection: sa.Connection, values: Mapping[str, str], *, local: bool = False) -> None:
    for name, value in values.items():
        connection.execute(sa.select(sa.func.set_config(name, value, local)))


def _failed(connection: sa.Connection) -> bool:
    try:
        connection.execute(sa.select(sa.literal(1)))
    except sa.exc.DBAPIError:
        return True
    return False


class Pause:
    """Waits that double from first to longest, in seconds, and are never in step with anybody's."""

    def __init__(self, first: float = 0.1, longest: float = 30.0) -> None:
        self._first = self._next = first
        self._longest = longest

    def next(self) -> float:
        """The wait to take now."""
        wait = self._next
        self._next = min(self._next * 2, self._longest)
        return wait * random.uniform(0.75, 1.25)

    def sleep(self) -> None:
        """Take it."""
        time.sleep(self.next())

    def reset(self) -> None:
        """Begin with the first again."""
        self._next = self._first


def holders(connection: sa.Connection, relation: str) -> list[str]:
    """Who else has a lock on a table now, the longest transaction first, one line each."""
    locks, activity = LOCKS, ACTIVITY
    statement = (
        sa.select(
            activity.c.pid,
            activity.c.usename,
            activity.c.application_name,
            activity.c.state,
            sa.extract("epoch", sa.func.now() - activity.c.xact_start).label("seconds"),
        )
        .join_from(locks, activity, locks.c.pid == activity.c.pid)
        .where(
            locks.c.relation == oid_of(relation),
            locks.c.granted,
            activity.c.pid != sa.func.pg_backend_pid(),
        )
        .group_by(*activity.c["pid", "usename", "application_name", "state", "xact_start"])
        .order_by(activity.c.xact_start)
    )
    return [_line(row) for row in connection.execute(statement)]


def _line(row: Any) -> str:
    name = row.application_name or row.usename or "unnamed"
    age = f"{float(row.seconds):.0f} s" if row.seconds is not None else "an unknown time"
    return f"process {row.pid} ({name}, {row.state or 'state hidden'}, in a transaction for {age})"


def busy_message(
    connection: sa.Connection, relation: str | None, attempts: int, lock_timeout: float
) -> str:
    """What to say where a lock could not be had: who holds it, and what to do."""
    lines = [] if relation is None else holders(connection, relation)
    held = "; ".join(lines[:5]) or "no other session now, so trying again may do"
    return (
        f"The lock on {relation or 'the table'} could not be had in {attempts} attempts of "
        f"{lock_timeout:g} s. It is held by: {held}. Nothing was changed; end the long transaction "
        "and run the same command again."
    )
