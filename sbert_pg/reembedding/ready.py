"""The start-up check: may this code serve the embedding columns that it declares?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import system
from sbert_pg.distance import INDEX_METHODS
from sbert_pg.errors import BackfillIncompleteError, NotBoundError
from sbert_pg.reembedding.coverage import coverage_of, first_late, marks_of
from sbert_pg.reembedding.vector_index import vector_indexes
from sbert_pg.types import Embedding
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.indexed import index_on


def assert_ready(
    bind: sa.Engine | sa.Connection,
    declared: Any,
    *,
    max_failed: int | None = None,
    max_pending: int | None = None,
    count: bool = True,
) -> None:
    """Do nothing where every declared embedding column can be served; else say what is missing.

    For the start of a process, or its readiness probe: a deployment that switches to a column whose
    backfill is not complete stops here, and the old version goes on serving. A column can be served
    where it is bound to the declared encoder, every row with text has a vector (a few rows that
    became pending less than a minute ago apart), and each declared vector index is there and valid.

    Nothing is written. Async callers use ``await connection.run_sync(assert_ready, Base)``.

    Args:
        bind: an engine or a connection.
        declared: a declarative base, a mapped class, a table, ``MetaData``, an embedding column, or
            several of these.
        max_failed: rows allowed whose text could not be encoded; any number by default, since one
            odd text should not stop a deployment.
        max_pending: pending rows allowed, of whatever age; any number by default.
        count: whether to look at the tables themselves. Where nothing is missing that reads each
            once, a second or so for a million rows; without it only bindings, marks and indexes are
            looked at, which does not notice a backfill that has not begun.

    Raises:
        EncoderMismatchError: a column belongs to another encoder than the code declares.
        NotBoundError: a column is not bound, or does not exist.
        BackfillIncompleteError: rows or indexes are missing; all columns' reasons together.
    """
    columns = list(embedding_columns(declared))
    reasons: list[str] = []
    with _connection(bind) as connection:
        for column in columns:
            reasons.extend(_missing(connection, column, max_failed, max_pending, count))
    if reasons:
        raise BackfillIncompleteError(
            f"This code cannot serve what it declares yet: {'; '.join(reasons)}. Keep the version "
            "that serves now until 'sbert-pg reembed status' says ready."
        )


def embedding_columns(declared: Any) -> Iterator[sa.Column[Any]]:
    """The embedding columns of a base, class, table, metadata or column, or of several.

    Raises:
        NotBoundError: there is none in what was given, which can only be a mistake.
    """
    found = list(_columns(declared))
    if not found:
        raise NotBoundError(
            f"{declared!r} declares no embedding column, so there is nothing to check. Give the "
            "declarative base, a mapped class, a table or its metadata."
        )
    return iter(dict.fromkeys(found))


def _columns(declared: Any) -> Iterator[sa.Column[Any]]:
    if hasattr(declared, "__clause_element__"):
        declared = declared.__clause_element__()
    if isinstance(declared, sa.Column):
        if isinstance(declared.type, Embedding):
            yield declared
    elif isinstance(declared, sa.Table):
        for column in declared.columns:
            yield from _columns(column)
    elif isinstance(declared, sa.MetaData):
        for table in declared.tables.values():
            yield from _columns(table)
    elif hasattr(declared, "__table__"):
        yield from _columns(declared.__table__)
    elif hasattr(declared, "metadata"):
        yield from _columns(declared.metadata)
    elif isinstance(declared, Iterable):
        for each in declared:
            yield from _columns(each)


@contextmanager
def _connection(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    if isinstance(bind, sa.Connection):
        yield bind
        return
    with bind.connect().execution_options(postgresql_readonly=True) as connection:
        yield connection
        connection.rollback()


def _missing(
    connection: sa.Connection,
    column: sa.Column[Any],
    max_failed: int | None,
    max_pending: int | None,
    count: bool,
) -> Iterator[str]:
    type_, table = column.type, column.table
    assert isinstance(type_, Embedding)
    assert isinstance(table, sa.Table)
    identity = ColumnIdentity(table.schema, table.name, column.name)
    binding = catalog.require_binding(connection, identity)
    catalog.hold(connection, identity, type_.encoder)
    late = first_late(connection, binding) if count else None
    if late is not None:
        c = coverage_of(connection, binding)
        yield (
            f"{binding} lacks the vectors of {c.missing:,} of {c.with_text:,} rows with text, one "
            f"of them {late}"
        )
    pending, failed = marks_of(connection, binding)
    if max_pending is not None and pending > max_pending:
        yield f"{pending:,} rows of {binding} are pending"
    if max_failed is not None and failed > max_failed:
        yield f"{failed:,} rows of {binding} have failed"
    yield from _index_missing(connection, column, table)


def _index_missing(
    connection: sa.Connection, column: sa.Column[Any], table: sa.Table
) -> Iterator[str]:
    if index_on(column) is None:
        return
    relation = system.relation_name(table, connection)
    there = {i.name: i.valid for i in vector_indexes(connection, relation, column.name)}
    for name in (str(index.name) for index in declared_indexes(column)):
        if name not in there:
            yield f"index {name} does not exist"
        elif not there[name]:
            yield f"index {name} is not valid"


def declared_indexes(column: sa.Column[Any]) -> list[sa.Index]:
    """The vector indexes that a class declares on one of its columns."""
    return [index for index in column.table.indexes if _is_on(index, column)]


def _is_on(index: sa.Index, column: sa.Column[Any]) -> bool:
    using = index.dialect_options["postgresql"]["using"]
    return using in INDEX_METHODS and column.name in index.columns


__all__ = ["assert_ready", "declared_indexes", "embedding_columns"]
