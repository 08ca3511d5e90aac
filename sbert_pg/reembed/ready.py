"""Is a column ready? The check at the start of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.errors import BackfillIncompleteError, NotBoundError
from sbert_pg.freshness.queue import coverage_of
from sbert_pg.indexes import vector_indexes
from sbert_pg.row_vectors import EmbeddingColumn, embedding_columns
from sbert_pg.system import require_connection
from sbert_pg.types.indexed import method_of


def require_ready(
    bind: sa.Engine | sa.Connection,
    declared: Any,
    *,
    max_pending: int | None = 0,
    max_failed: int | None = None,
) -> None:
    """Do nothing where every declared embedding column can be served; else say what is missing.

    For the start of a process, or its readiness probe: a deployment that switches to a column whose
    backfill is not complete stops here, and the old version keeps serving. A column can be served
    where it is bound to the declared encoder, every row has the vector of its text, and each
    declared vector index is there and valid. It takes some milliseconds, however large the table.

    Nothing is written. Async callers use ``await connection.run_sync(require_ready, Base)``.

    Args:
        bind: an engine or a connection.
        declared: a declarative base, a mapped class, a table, ``MetaData``, an embedding column, or
            several of these.
        max_pending: new and changed rows that may wait for their vector. An application that leaves
            all encoding to workers has some at any moment, and should say how many are normal. Any
            number for ``None``.
        max_failed: rows allowed whose text could not be encoded; any number by default, since one
            odd text should not stop a deployment.

    Raises:
        DeclarationError: ``bind`` is asynchronous.
        EncoderMismatchError: a column belongs to another encoder than the code declares.
        NotBoundError: a column is not bound, or does not exist.
        BackfillIncompleteError: rows or indexes are missing; all columns' reasons together.
    """
    require_connection("require_ready", bind, or_engine=True)
    columns = embedding_columns(declared)
    if not columns:
        raise NotBoundError(
            f"{declared!r} declares no embedding column, so there is nothing to check. Give the "
            "declarative base, a mapped class, a table or its metadata."
        )
    reasons: list[str] = []
    with _connection(bind) as connection:
        for column in columns:
            reasons.extend(_missing(connection, column, max_pending, max_failed))
    if reasons:
        raise BackfillIncompleteError(
            f"This code cannot serve what it declares yet: {'; '.join(reasons)}. Keep the version "
            "that serves now until 'sbert-pg reembed status' says ready."
        )


@contextmanager
def _connection(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    if isinstance(bind, sa.Connection):
        yield bind
        return
    with bind.connect().execution_options(postgresql_readonly=True) as connection:
        yield connection


def _missing(
    connection: sa.Connection,
    column: EmbeddingColumn,
    max_pending: int | None,
    max_failed: int | None,
) -> Iterator[str]:
    identity = column.identity
    binding = catalog.require_binding(connection, identity)
    catalog.hold(connection, identity, column.spec)
    coverage = coverage_of(connection, binding, whole=False)
    for reason in coverage.reasons(max_pending, max_failed):
        yield f"{binding}: {reason}"
    stored = vector_indexes(connection, identity.table, identity.column, schema=identity.schema)
    valid = {index.name: index.valid for index in stored}
    for name in (str(index.name) for index in declared_indexes(column.column)):
        if name not in valid:
            yield f"index {name} does not exist"
        elif not valid[name]:
            yield f"index {name} is not valid"


def declared_indexes(column: sa.Column[Any]) -> list[sa.Index]:
    """The vector indexes that a class declares on one of its columns."""
    return [
        index
        for index in column.table.indexes
        if method_of(index) is not None and column.name in index.columns
    ]
