"""The server's own catalogs and statistics, as far as this package reads them, and its names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, OID
from sqlalchemy.ext.compiler import compiles

from sbert_pg.errors import DeclarationError
from sbert_pg.source import NOT_STORED, UNSTORABLE


def _catalog(name: str, **types: Any) -> sa.TableClause:
    columns: list[Any] = [sa.column(column, type_) for column, type_ in types.items()]
    return sa.table(name, *columns, schema="pg_catalog")


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
    """Schema, table and column of a column of a table.

    Raises:
        DeclarationError: it is neither, or its names are none of PostgreSQL's.
    """
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


def oid_of(relation: str) -> sa.ColumnElement[int]:
    """The oid of a table given as text, quoted where it has to be; ``NULL`` where there is none."""
    return sa.cast(sa.func.to_regclass(relation), OID)


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
    """Refuse an engine, or what is asynchronous, where a connection or a session is expected.

    Raises:
        DeclarationError: it is one of these.
    """
    # sync_engine and sync_session are what an asynchronous engine, connection or session has.
    asynchronous = hasattr(connection, "sync_engine") or hasattr(connection, "sync_session")
    if asynchronous or (isinstance(connection, sa.Engine) and not or_engine):
        name = type(connection).__name__
        raise DeclarationError(
            f"{function}() takes a connection, and got {name}. Open one by 'with engine.begin() as "
            f"connection'; asynchronous code calls 'await connection.run_sync({function}, ...)'."
        )


def require_engine(what: str, engine: Any) -> None:
    """Refuse what is no synchronous engine.

    Raises:
        DeclarationError: it is none.
    """
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
    """DDL that SQLAlchemy has no construct for.

    Args:
        write: writes it, given the compiler; see ``ddl_name``.
    """

    # Not ``sa.DDL``, which doubles the percent signs of a name that the compiler has doubled.
    def __init__(self, write: Callable[[Any], str]) -> None:
        self.write = write


@compiles(Statement)
def _write(element: Statement, compiler: Any, **_: Any) -> str:
    return element.write(compiler)


def ddl(statement: str, table: sa.Table) -> Statement:
    """A statement about a table, which is ``%(fullname)s`` in it."""
    return Statement(lambda c: statement % {"fullname": c.preparer.format_table(table)})
