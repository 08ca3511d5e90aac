"""Look bindings up."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog import system, tables
from sbert_pg.catalog.record import Binding, from_row, select_bindings
from sbert_pg.catalog.tables import SCHEMA
from sbert_pg.errors import CatalogError, DeclarationError
from sbert_pg.types.guard import ColumnIdentity


def binding_of(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding | None:
    """The binding of a column, or ``None`` where it, or the whole catalog, is not there.

    Args:
        connection: a connection to the database.
        column: a column of a table, or its identity. A partition stands for its table, and a
            ``schema_translate_map`` of the connection is followed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    identity = identity_of(column)
    if not installed(connection):
        return None
    c = tables.embedding_column.c
    wanted = select_bindings().where(
        c.relation == relation_of(connection, identity), c.column_name == identity.column
    )
    found = connection.execute(wanted).first()
    return None if found is None else from_row(found)


def binding_by_id(connection: Connection, binding_id: int) -> Binding | None:
    """The binding with a number, or ``None``."""
    wanted = select_bindings().where(tables.embedding_column.c.id == binding_id)
    found = connection.execute(wanted).first()
    return None if found is None else from_row(found)


def all_bindings(connection: Connection) -> list[Binding]:
    """Every binding whose table exists, by number; none where the catalog is not installed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    if not installed(connection):
        return []
    rows = connection.execute(select_bindings().order_by(tables.embedding_column.c.id))
    return [from_row(row) for row in rows]


def installed(connection: Connection) -> bool:
    """Whether the catalog is in the database.

    Raises:
        CatalogError: it is, and this role may not use it.
    """
    row = connection.execute(
        sa.select(sa.func.has_schema_privilege(system.NAMESPACE.c.oid, "USAGE")).where(
            system.NAMESPACE.c.nspname == SCHEMA,
            sa.exists().where(
                system.CLASS.c.relnamespace == system.NAMESPACE.c.oid,
                system.CLASS.c.relname == tables.embedding_column.name,
            ),
        )
    ).first()
    if row is not None and not row[0]:
        role = connection.execute(sa.select(sa.func.current_user())).scalar_one()
        raise CatalogError(
            f"The role {role!r} may not use the schema {SCHEMA!r}. Let its owner run: "
            f"SELECT sbert.grant_v1('{role}', 'writer')"
        )
    return row is not None


def identity_of(column: ColumnIdentity | sa.Column[Any]) -> ColumnIdentity:
    """Schema, table and column of a column of a table.

    Raises:
        DeclarationError: it is neither.
    """
    if isinstance(column, ColumnIdentity):
        return column
    table = getattr(column, "table", None)
    if table is None or not hasattr(table, "name"):
        raise DeclarationError(
            f"{column!r} is no column of a table; pass Article.__table__.c.embedding or a "
            "ColumnIdentity(schema, table, column)."
        )
    return ColumnIdentity(getattr(table, "schema", None), table.name, column.name)


def relation_of(connection: Connection, identity: ColumnIdentity) -> sa.ColumnElement[Any]:
    """The table as ``regclass``, of a partition its parent; NULL where it is not there."""
    relation = sa.func.to_regclass(qualified(connection, identity))
    return sa.func.coalesce(sa.func.pg_partition_root(relation), relation)


def qualified(connection: Connection, identity: ColumnIdentity) -> str:
    """The table's name as ``regclass`` reads it, every part quoted."""
    schema = identity.schema
    translations = connection.get_execution_options().get("schema_translate_map")
    if translations and schema in translations:
        schema = translations[schema]
    return ".".join(
        '"' + part.replace('"', '""') + '"' for part in (schema, identity.table) if part is not None
    )


__all__ = [
    "all_bindings",
    "binding_by_id",
    "binding_of",
    "identity_of",
    "installed",
    "qualified",
    "relation_of",
]
