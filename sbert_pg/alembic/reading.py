"""The vector indexes of a database, read off its catalogs, and whether two are the same."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID
from sqlalchemy.ext.compiler import compiles

from sbert_pg.alembic import statements
from sbert_pg.alembic.declaration import IndexDefinition
from sbert_pg.catalog import system
from sbert_pg.distance import INDEX_METHODS


def indexes_of(
    connection: sa.Connection, table: str, schema: str | None
) -> dict[str, tuple[IndexDefinition, bool]]:
    """The vector indexes of a table by name, each with whether it is valid.

    Args:
        connection: where.
        table: the table.
        schema: its schema, ``None`` for the search path's.
    """
    name = statements.relation(table, schema)
    # A table that the search path does not reach by this name has none.
    rows = connection.execute(_select(sa.func.to_regclass(name)))
    return {
        row.relname: (_read(row, table, schema), bool(row.indisvalid and row.indisready))
        for row in rows
    }


def _select(relation: sa.ColumnElement[Any]) -> sa.Select[Any]:
    index, klass, opclass = system.INDEX, system.CLASS, system.OPCLASS
    indkey = sa.literal_column("pg_index.indkey[0]", sa.Integer)
    column = (
        sa.select(system.ATTRIBUTE.c.attname)
        .where(system.ATTRIBUTE.c.attrelid == index.c.indrelid, system.ATTRIBUTE.c.attnum == indkey)
        .scalar_subquery()
    )
    inner = (
        sa.select(system.ATTRIBUTE.c.attname)
        .join_from(
            system.DEPEND,
            system.ATTRIBUTE,
            system.ATTRIBUTE.c.attnum == system.DEPEND.c.refobjsubid,
        )
        .join(system.TYPE, system.TYPE.c.oid == system.ATTRIBUTE.c.atttypid)
        .where(
            system.DEPEND.c.objid == index.c.indexrelid,
            system.DEPEND.c.refobjid == index.c.indrelid,
            system.ATTRIBUTE.c.attrelid == index.c.indrelid,
            system.TYPE.c.typname.in_(["vector", "halfvec", "sparsevec", "bit"]),
        )
        .limit(1)
        .scalar_subquery()
    )
    return (
        sa.select(
            klass.c.relname,
            sa.literal_column("pg_index.indisvalid", sa.Boolean).label("indisvalid"),
            sa.literal_column("pg_index.indisready", sa.Boolean).label("indisready"),
            system.AM.c.amname,
            opclass.c.opcname,
            klass.c.reloptions,
            column.label("column_name"),
            inner.label("inner_name"),
            sa.func.pg_get_indexdef(index.c.indexrelid, 1, True, type_=sa.Text()).label("element"),
            sa.func.pg_get_expr(
                sa.literal_column("pg_index.indpred"), index.c.indrelid, True, type_=sa.Text()
            ).label("predicate"),
            sa.literal_column(
                "(SELECT spcname FROM pg_tablespace WHERE pg_tablespace.oid = "
                "pg_class.reltablespace)",
                sa.Text(),
            ).label("tablespace"),
        )
        .select_from(index)
        .join(klass, klass.c.oid == index.c.indexrelid)
        .join(system.AM, system.AM.c.oid == klass.c.relam)
        .join(opclass, opclass.c.oid == sa.literal_column("pg_index.indclass[0]", OID))
        .where(
            index.c.indrelid == sa.cast(relation, OID),
            system.AM.c.amname.in_(INDEX_METHODS),
        )
        .order_by(klass.c.relname)
    )


def _read(row: Any, table: str, schema: str | None) -> IndexDefinition:
    plain = row.column_name is not None
    return IndexDefinition(
        name=row.relname,
        table=table,
        schema=schema,
        column=row.column_name if plain else row.inner_name or "",
        expression=None if plain else row.element,
        using=row.amname,
        opclass=row.opcname,
        options=dict(option.split("=", 1) for option in row.reloptions or ()),
        where=row.predicate,
        tablespace=row.tablespace,
    )


def same(connection: sa.Connection, wanted: IndexDefinition, found: IndexDefinition) -> bool:
    """Whether an index of the database is the one that is wanted.

    Method, operator class, options, tablespace, expression and predicate count. Expressions are
    compared as the server itself writes them, by building the wanted index on an empty temporary
    copy of the table; where that is not allowed, by their text without blanks, brackets and casts.
    """
    if wanted.using != found.using or wanted.effective_options != found.effective_options:
        return False
    if wanted.tablespace != found.tablespace:
        return False
    simple = wanted.expression is None and wanted.where is None and wanted.opclass is not None
    if not simple:
        normal = _normalized(connection, wanted)
        if normal is not None:
            return _essence(normal) == _essence(found)
    if wanted.opclass not in (None, found.opclass):
        return False
    if wanted.expression is None or found.expression is None:
        same_element = wanted.expression == found.expression and wanted.column == found.column
    else:
        same_element = _squeezed(wanted.expression) == _squeezed(found.expression)
    return same_element and _squeezed(wanted.where) == _squeezed(found.where)


def _essence(definition: IndexDefinition) -> IndexDefinition:
    return replace(definition, name="", table="", schema=None, options={}, tablespace=None)


def _normalized(connection: sa.Connection, wanted: IndexDefinition) -> IndexDefinition | None:
    """A definition as the server writes it, or ``None`` where it could not be asked."""
    table = f"sbert_{uuid.uuid4().hex[:16]}"
    try:
        with _taken_back(connection):
            connection.execute(_CopyTable(table, wanted))
            try:
                create = statements.CreateIndex(
                    replace(wanted, tablespace=None),
                    concurrently=False,
                    name=f"{table}_i",
                    table=("pg_temp", table),
                )
                connection.execute(create)
                found = indexes_of(connection, table, "pg_temp")
                return found[f"{table}_i"][0]
            finally:
                if not connection.in_nested_transaction():
                    connection.execute(_DropTable(table))
    except sa.exc.DBAPIError:
        return None


@contextlib.contextmanager
def _taken_back(connection: sa.Connection) -> Iterator[None]:
    """A savepoint that is rolled back; nothing of the kind where every statement commits itself."""
    if connection.get_isolation_level() == "AUTOCOMMIT":
        yield
        return
    savepoint = connection.begin_nested()
    try:
        yield
    finally:
        savepoint.rollback()


class _CopyTable(sa.schema.DDLElement):
    def __init__(self, name: str, wanted: IndexDefinition) -> None:
        self.name = name
        self.wanted = wanted


class _DropTable(sa.schema.DDLElement):
    def __init__(self, name: str) -> None:
        self.name = name


def _squeezed(expression: str | None) -> str:
    """An expression without what the server adds to it and takes from it."""
    text = (expression or "").lower()
    text = re.sub(r"cast\s*\((.+?)\s+as\s+([a-z_ ]+(?:\(\d+\))?)\)", r"\1::\2", text)
    text = re.sub(r"::(text|character varying|varchar)\b(\(\d+\))?", "", text)
    return re.sub(r"[\s()\"]", "", text)


@compiles(_CopyTable)
def _copy_table(element: _CopyTable, compiler: Any, **_: Any) -> str:
    quote, wanted = compiler.preparer.quote, element.wanted
    source = quote(wanted.table)
    if wanted.schema is not None:
        source = f"{quote(wanted.schema)}.{source}"
    return f"CREATE TEMPORARY TABLE {quote(element.name)} (LIKE {source})"


@compiles(_DropTable)
def _drop_table(element: _DropTable, compiler: Any, **_: Any) -> str:
    return f"DROP TABLE IF EXISTS pg_temp.{compiler.preparer.quote(element.name)}"
