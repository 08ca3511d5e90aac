"""Text columns whose declaration has changed: made again, since a generated column has no ALTER."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

import sqlalchemy as sa
from alembic.operations import ops
from sqlalchemy.dialects.postgresql import TSVECTOR

from sbert_pg.types.text import TextSearch


def changed_texts(connection: sa.Connection, table: sa.Table) -> list[ops.MigrateOperation]:
    """What makes the text columns of a table again whose sources, language or weights differ.

    The column and its indexes are dropped and made; PostgreSQL rewrites the table.
    """
    declared = [c for c in table.columns if isinstance(c.type, TextSearch)]
    if not declared:
        return []
    inspector = sa.inspect(connection)
    stored = {
        column["name"]: str(column["computed"]["sqltext"])
        for column in inspector.get_columns(table.name, schema=table.schema)
        if column.get("computed")
    }
    present = {index["name"] for index in inspector.get_indexes(table.name, schema=table.schema)}
    changed: list[ops.MigrateOperation] = []
    for column in declared:
        if column.name in stored and not _same(stored[column.name], column):
            changed.append(_remade(table, column, stored[column.name], present))
    return changed


def _remade(
    table: sa.Table, column: sa.Column[Any], stored: str, present: Set[str | None]
) -> ops.ModifyTableOps:
    """What drops a text column with its indexes, and makes them again."""
    indexes = [i for i in table.indexes if column.name in i.columns and i.name in present]
    computed = sa.Computed(stored.replace(":", r"\:"), persisted=True)
    old = sa.Column(column.name, TSVECTOR(), computed)
    operations: list[Any] = [ops.DropIndexOp.from_index(index) for index in indexes]
    for step, one in ((ops.DropColumnOp, old), (ops.AddColumnOp, column)):
        operations.append(step.from_column_and_tablename(table.schema, table.name, one))
    operations += [ops.CreateIndexOp.from_index(index) for index in indexes]
    return ops.ModifyTableOps(table.name, operations, schema=table.schema)


def _same(stored: str, column: sa.Column[Any]) -> bool:
    """Whether two expressions are the same but for blanks, brackets and quotes."""
    assert column.computed is not None
    texts = (stored, str(column.computed.sqltext))
    one, other = (re.sub(r"[\s()\\\"']", "", text).lower() for text in texts)
    return one == other
