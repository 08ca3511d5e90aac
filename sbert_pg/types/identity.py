"""A column as the database names it."""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa

from sbert_pg.errors import DeclarationError
from sbert_pg.source import NOT_STORED, UNSTORABLE


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
