"""What the operations do on other databases, such as SQLite, where models are tested.

Columns come and go there as the mapped classes have them, so that rows can be written and read.
Nothing is bound, indexed, counted or embedded; each operation says so by a warning.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

from sbert_pg.alembic import ops
from sbert_pg.catalog.embedding import companion_column
from sbert_pg.source import companion_name
from sbert_pg.types.vector import plain_type

log = logging.getLogger("sbert_pg.alembic")


def carry_out_elsewhere(operation: ops.SbertOperation, operations: Operations) -> None:
    """Carry an operation out as far as it is about columns, and pass over the rest."""
    dialect = operations.migration_context.dialect.name
    log.warning("op.%s: on %s columns come and go, and no more.", operation.name, dialect)
    if not isinstance(operation, ops.ColumnOperation):
        return
    table, schema = operation.table_name, operation.schema
    for name, change in _columns_elsewhere(operation).items():
        if isinstance(change, sa.Column):
            if not _is_there(name, operation, operations):
                operations.add_column(table, change, schema=schema)
        elif _is_there(name, operation, operations):
            if change is None:
                operations.drop_column(table, name, schema=schema)
            else:
                operations.alter_column(table, name, new_column_name=change, schema=schema)


def _is_there(name: str, operation: ops.ColumnOperation, operations: Operations) -> bool:
    """Whether the table has a column of a name."""
    if operations.migration_context.as_sql:
        # A script cannot look: a table that it creates has the columns that it binds.
        return not isinstance(operation, ops.AddEmbeddingColumnOp)
    inspector = sa.inspect(operations.get_bind())
    columns = inspector.get_columns(operation.table_name, schema=operation.schema)
    return name in {column["name"] for column in columns}


@functools.singledispatch
def _columns_elsewhere(operation: ops.ColumnOperation) -> dict[str, Any]:
    """By name a column that a table gets, ``None`` for one that it loses, or another's new name."""
    return {}


@_columns_elsewhere.register
def _(operation: ops.DeclaringOperation) -> dict[str, Any]:
    column = companion_column(operation.column_name)
    return {column.name: column}


@_columns_elsewhere.register
def _(operation: ops.AddEmbeddingColumnOp) -> dict[str, Any]:
    name, declared = operation.column_name, operation.declared
    column: sa.Column[Any] = sa.Column(name, plain_type(declared.storage, declared.dimensions))
    return {companion_name(name): companion_column(name), name: column}


@_columns_elsewhere.register
def _(operation: ops.DropEmbeddingColumnOp) -> dict[str, Any]:
    return dict.fromkeys((companion_name(operation.column_name), operation.column_name))


@_columns_elsewhere.register
def _(operation: ops.UnbindEmbeddingColumnOp) -> dict[str, Any]:
    return {companion_name(operation.column_name): None}


@_columns_elsewhere.register
def _(operation: ops.RenameBoundColumnOp) -> dict[str, Any]:
    names = {operation.column_name: operation.new_name}
    return names | {companion_name(old): companion_name(new) for old, new in names.items()}
