"""Indexes as a server has them, read off its catalogs, and whether two are the same."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID

from sbert_pg import system
from sbert_pg.distance import INDEX_METHODS
from sbert_pg.types.indexed import VectorIndex, as_number, form_of

#: ``"absent"``, usable, left behind by a build that failed, or being built by some session.
IndexState = Literal["absent", "valid", "invalid", "building"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredIndex(VectorIndex):
    """A vector index of a database; ``last_scan`` is not known before PostgreSQL 16."""

    valid: bool
    building: bool
    definition: str
    bytes: int
    scans: int
    last_scan: dt.datetime | None


def vector_indexes(
    connection: sa.Connection, table: str, column: str | None = None, *, schema: str | None = None
) -> tuple[StoredIndex, ...]:
    """The vector indexes of a table, or of one column, by name; none without such a table."""
    name = system.name_in(connection, schema, table)
    indexes = (
        _read(row, table, schema) for row in connection.execute(_statement(connection, name))
    )
    return tuple(index for index in indexes if column is None or index.column == column)


def knows_last_scan(connection: sa.Connection) -> bool:
    """Whether the server says when an index was last scanned, as from PostgreSQL 16 on."""
    return (connection.dialect.server_version_info or (0,)) >= (16,)


def _statement(connection: sa.Connection, relation: str) -> sa.Select[Any]:
    index, klass, opclass = system.INDEX, system.CLASS, system.OPCLASS
    statistics = system.INDEX_STATISTICS
    last: sa.ColumnElement[Any] = statistics.c.last_idx_scan
    if not knows_last_scan(connection):
        last = sa.null().cast(sa.DateTime(timezone=True))
    return (
        sa.select(
            klass.c.relname,
            sa.and_(index.c.indisvalid, index.c.indisready).label("valid"),
            _is_building().label("building"),
            system.AM.c.amname,
            opclass.c.opcname,
            klass.c.reloptions,
            _own_column().label("column_name"),
            _inner_column().label("inner_name"),
            sa.func.pg_get_indexdef(index.c.indexrelid, 1, True, type_=sa.Text()).label("element"),
            sa.func.pg_get_expr(index.c.indpred, index.c.indrelid, True, type_=sa.Text()).label(
                "predicate"
            ),
            system.TABLESPACE.c.spcname,
            sa.func.pg_get_indexdef(index.c.indexrelid, type_=sa.Text()).label("definition"),
            sa.func.pg_relation_size(index.c.indexrelid, type_=sa.BigInteger()).label("bytes"),
            sa.func.coalesce(statistics.c.idx_scan, 0).label("scans"),
            last.label("last_scan"),
        )
        .select_from(index)
        .join(klass, klass.c.oid == index.c.indexrelid)
        .join(system.AM, system.AM.c.oid == klass.c.relam)
        .join(opclass, opclass.c.oid == sa.literal_column("pg_index.indclass[0]", OID))
        .outerjoin(system.TABLESPACE, system.TABLESPACE.c.oid == klass.c.reltablespace)
        .outerjoin(statistics, statistics.c.indexrelid == index.c.indexrelid)
        .where(index.c.indrelid == system.oid_of(relation), system.AM.c.amname.in_(INDEX_METHODS))
        .order_by(klass.c.relname)
    )


def _is_building() -> sa.ColumnElement[bool]:
    progress = system.INDEX_PROGRESS.c
    return (
        sa.select(sa.literal(1)).where(progress.index_relid == system.INDEX.c.indexrelid).exists()
    )


def _own_column() -> sa.ScalarSelect[Any]:
    """The column that is indexed itself."""
    attribute, index = system.ATTRIBUTE.c, system.INDEX.c
    number = sa.literal_column("pg_index.indkey[0]", sa.Integer)
    return (
        sa.select(attribute.attname)
        .where(attribute.attrelid == index.indrelid, attribute.attnum == number)
        .scalar_subquery()
    )


def _inner_column() -> sa.ScalarSelect[Any]:
    """The vector column within an expression."""
    attribute, index, depend = system.ATTRIBUTE.c, system.INDEX.c, system.DEPEND.c
    return (
        sa.select(attribute.attname)
        .join_from(system.DEPEND, system.ATTRIBUTE, attribute.attnum == depend.refobjsubid)
        .join(system.TYPE, system.TYPE.c.oid == attribute.atttypid)
        .where(
            depend.classid == system.oid_of("pg_catalog.pg_class"),
            depend.objid == index.indexrelid,
            depend.refobjid == index.indrelid,
            attribute.attrelid == index.indrelid,
            system.TYPE.c.typname.in_(["vector", "halfvec", "sparsevec", "bit"]),
        )
        .limit(1)
        .scalar_subquery()
    )


def _read(row: Any, table: str, schema: str | None) -> StoredIndex:
    plain = row.column_name is not None
    options = dict(option.split("=", 1) for option in row.reloptions or ())
    return StoredIndex(
        name=row.relname,
        table=table,
        schema=schema,
        column=row.column_name if plain else row.inner_name or "",
        method=row.amname,
        form="column" if plain else form_of(row.element),
        opclass=row.opcname,
        options={key: as_number(value) for key, value in options.items()},
        element=None if plain else row.element,
        predicate=row.predicate,
        tablespace=row.spcname,
        valid=row.valid,
        building=row.building,
        definition=row.definition,
        bytes=row.bytes,
        scans=row.scans,
        last_scan=row.last_scan,
    )


def index_state(connection: sa.Connection, relation: str, name: str) -> IndexState:
    """State of an index of any kind, on a table given as text for ``to_regclass``."""
    index = system.INDEX.c
    row = connection.execute(
        sa.select(sa.and_(index.indisvalid, index.indisready), _is_building())
        .join(system.CLASS, system.CLASS.c.oid == index.indexrelid)
        .where(index.indrelid == system.oid_of(relation), system.CLASS.c.relname == name)
    ).one_or_none()
    if row is None:
        return "absent"
    if row[0]:
        return "valid"
    return "building" if row[1] else "invalid"


def same_index(connection: sa.Connection, declared: VectorIndex, stored: VectorIndex) -> bool:
    """Whether an index of the database is the one that is declared.

    Method, operator class, options, tablespace, expression and predicate count. Expressions are
    compared as the server itself writes them, by building the declared index on an empty temporary
    copy of the table; where that is not allowed, by their text without blanks, brackets and casts.
    """
    if declared.method != stored.method or declared.tablespace != stored.tablespace:
        return False
    if declared.effective_options != stored.effective_options:
        return False
    simple = (
        declared.element is None and declared.predicate is None and declared.opclass is not None
    )
    if not simple:
        normal = _normalized(connection, declared)
        if normal is not None:
            return _essence(normal) == _essence(stored)
    return _same_text(declared, stored)


def _same_text(declared: VectorIndex, stored: VectorIndex) -> bool:
    if declared.opclass not in (None, stored.opclass):
        return False
    if declared.element is None or stored.element is None:
        same_element = declared.element is stored.element and declared.column == stored.column
    else:
        same_element = _squeezed(declared.expression) == _squeezed(stored.expression)
    return same_element and _squeezed(declared.where) == _squeezed(stored.where)


def _essence(index: VectorIndex) -> tuple[str | None, ...]:
    return index.column, index.opclass, index.expression, index.where


def _normalized(connection: sa.Connection, declared: VectorIndex) -> VectorIndex | None:
    """An index as the server writes it, or ``None`` where it could not be asked."""
    table = f"sbert_{uuid.uuid4().hex[:16]}"
    try:
        with _rolled_back(connection):
            connection.execute(copy_table(table, declared.schema, declared.table))
            try:
                copy = declared.to_index(name=f"{table}_i", table=("pg_temp", table))
                copy.dialect_options["postgresql"]["tablespace"] = None
                connection.execute(sa.schema.CreateIndex(copy))
                return vector_indexes(connection, table, schema="pg_temp")[0]
            finally:
                if not connection.in_nested_transaction():
                    copied = sa.Table(table, sa.MetaData(), schema="pg_temp")
                    connection.execute(sa.schema.DropTable(copied, if_exists=True))
    except sa.exc.DBAPIError:
        return None


@contextlib.contextmanager
def _rolled_back(connection: sa.Connection) -> Iterator[None]:
    """A savepoint that is rolled back; nothing of the kind where every statement commits itself."""
    if connection.get_isolation_level() == "AUTOCOMMIT":
        yield
        return
    savepoint = connection.begin_nested()
    try:
        yield
    finally:
        savepoint.rollback()


def copy_table(name: str, schema: str | None, table: str) -> system.Statement:
    """An empty temporary table with the columns of another."""

    def write(compiler: Any) -> str:
        source = system.ddl_name(compiler, schema, table)
        return f"CREATE TEMPORARY TABLE {compiler.preparer.quote(name)} (LIKE {source})"

    return system.Statement(write)


def _squeezed(expression: str | None) -> str:
    """An expression without what the server adds to it and takes from it."""
    text = (expression or "").lower()
    text = re.sub(r"cast\s*\((.+?)\s+as\s+([a-z_ ]+(?:\(\d+\))?)\)", r"\1::\2", text)
    text = re.sub(r"::(text|character varying|varchar)\b(\(\d+\))?", "", text)
    return re.sub(r"[\s()\"]", "", text)
