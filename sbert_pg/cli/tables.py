"""Tables as commands see them: reflected, with their bound columns as embedding columns."""

from __future__ import annotations

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.distance import STORAGES
from sbert_pg.errors import DeclarationError
from sbert_pg.types import Embedding, register_reflection


def table_of(connection: sa.Connection, name: str) -> sa.Table:
    """Reflect ``table`` or ``schema.table``, each bound column typed as its binding says.

    Raises:
        DeclarationError: there is no such table.
    """
    schema, _, table_name = name.rpartition(".")
    register_reflection()
    try:
        table = sa.Table(table_name, sa.MetaData(), schema=schema or None, autoload_with=connection)
    except sa.exc.NoSuchTableError as error:
        raise DeclarationError(
            f"There is no table {name!r} in this database; 'sbert-pg status' lists those with "
            "embedding columns."
        ) from error
    for bound in catalog.all_bindings(connection):
        if bound.table != table.name or bound.schema != (schema or bound.schema):
            continue
        column = table.c.get(bound.column)
        if column is None:
            continue
        storage = next(kind for kind in STORAGES if kind == bound.storage)
        column.type = Embedding(bound.declared, bound.source, storage=storage)
    return table


def embedding_of(table: sa.Table, column: str | None) -> sa.Column[object]:
    """The embedding column that a command means: the named one, or the only one.

    Raises:
        DeclarationError: there is none of this name, none at all, or more than one.
    """
    found = {c.name: c for c in table.columns if isinstance(c.type, Embedding)}
    names = ", ".join(sorted(found)) or "none"
    if column is not None:
        if column not in found:
            raise DeclarationError(
                f"{table.name!r} has no embedding column {column!r}; it has: {names}."
            )
        return found[column]
    if len(found) != 1:
        raise DeclarationError(
            f"Table {table.name!r} has {len(found)} embedding columns ({names}); "
            "name one with --column, or bind one in a migration."
        )
    return next(iter(found.values()))


__all__ = ["embedding_of", "table_of"]
