"""Expand: the new column beside the old one, and its index once most vectors are there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding, system
from sbert_pg.distance import Storage
from sbert_pg.errors import AlreadyBoundError, DimensionError, ReembeddingError
from sbert_pg.reembedding.building import BuildProgress
from sbert_pg.reembedding.locks import ATTEMPTS, LOCK_TIMEOUT, in_short_transactions, operations_on
from sbert_pg.reembedding.pair import Pair, pair_of, reflect, replacement_of
from sbert_pg.reembedding.vector_index import build_index, index_name
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding
from sbert_pg.types.guard import ColumnIdentity
from sbert_pg.types.vector import VectorType, plain_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A change of encoder, as somebody asks for it.

    Attributes:
        old: the column to be replaced; it is bound.
        new: name of the new column.
        encoder: the new encoder.
        source: the new source; the old column's by default.
        storage: ``"vector"`` or ``"halfvec"``; the old column's by default.
    """

    old: ColumnIdentity
    new: str
    encoder: EncoderSpec
    source: Source | None = None
    storage: Storage | None = None


def request_of(column: Any) -> Request:
    """The change that an embedding column declared with ``replaces=`` asks for.

    Args:
        column: a mapped attribute, or a column of a table.

    Raises:
        ReembeddingError: it is no embedding column, or replaces nothing.
    """
    if hasattr(column, "__clause_element__"):
        column = column.__clause_element__()
    type_ = getattr(column, "type", None)
    if not isinstance(type_, Embedding) or type_.replaces is None:
        raise ReembeddingError(
            f"{column} is not declared as the replacement of a column. Declare it with "
            "embedding_column(..., replaces='the old column')."
        )
    table = column.table
    return Request(
        old=ColumnIdentity(getattr(table, "schema", None), table.name, type_.replaces),
        new=column.name,
        encoder=type_.encoder,
        source=type_.source,
        storage=type_.storage,
    )


def start(
    engine: sa.Engine,
    request: Request,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> Binding:
    """Expand: add the new column beside the old one and bind it, in one transaction.

    ``ALTER TABLE ... ADD COLUMN`` takes ``ACCESS EXCLUSIVE`` for an instant, rewrites nothing and
    waits for the lock no longer than ``lock_timeout`` at a time. From the commit on every change of
    the source is noticed for both columns, whichever version of the application makes it.

    Args:
        engine: where.
        request: the change.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        The new column's binding; the one that is there, where this was done before.

    Raises:
        NotBoundError: the old column is not bound.
        AlreadyBoundError: the new column is bound to something else, or another column replaces
            the old one already.
        ReembeddingError: the new column exists and holds something else.
        TableBusyError: the table's lock could not be had.
    """

    def step(connection: sa.Connection) -> Binding:
        old = catalog.require_binding(connection, request.old)
        begun = replacement_of(connection, old)
        if begun is not None and begun.column != request.new:
            raise AlreadyBoundError(
                f"{old} is being replaced by column {begun.column!r} already. Finish that change "
                f"or abort it (sbert-pg reembed abort {begun}) before another one begins."
            )
        new = ColumnIdentity(old.schema, old.table, request.new)
        if begun is not None and _is_as_asked(begun, old, request):
            return begun
        type_ = plain_type(request.storage or old.storage, request.encoder.dimensions)
        _add_column(connection, new, type_)
        return catalog.bind(
            connection,
            new,
            request.encoder,
            request.source or old.source,
            replaces=old.column,
        )

    return in_short_transactions(
        engine,
        step,
        relation=system.name_of(engine.dialect, request.old.schema, request.old.table),
        lock_timeout=lock_timeout,
        attempts=attempts,
    )


def _is_as_asked(begun: Binding, old: Binding, request: Request) -> bool:
    """Whether the change has been begun already, so that no lock is needed to find out."""
    return (
        begun.declared.name == request.encoder.name
        and begun.dimensions == request.encoder.dimensions
        and begun.source == (request.source or old.source)
        and begun.storage == (request.storage or old.storage)
    )


def _add_column(connection: sa.Connection, column: ColumnIdentity, type_: VectorType) -> None:
    """Add the column unless it is there, with this type and nothing foreign in it."""
    table = reflect(connection, column.schema, column.table)
    there = table.c.get(column.column)
    if there is None:
        operations_on(connection).add_column(
            column.table, sa.Column(column.column, type_, nullable=True), schema=column.schema
        )
        return
    if not isinstance(there.type, VectorType) or there.type.get_col_spec() != type_.get_col_spec():
        raise DimensionError(
            f"{column} exists with type {there.type!r}, and the change needs "
            f"{type_.get_col_spec()}. Choose another name for the new column."
        )
    bound = catalog.binding_of(connection, column) is not None
    filled = sa.select(sa.literal(1)).select_from(table).where(there.is_not(None)).limit(1)
    if not bound and connection.execute(filled).first() is not None:
        raise ReembeddingError(
            f"{column} exists, holds vectors and is bound to no encoder. Adopt it first "
            "(sbert-pg adopt), or choose another name for the new column."
        )


def build_indexes(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    indexes: Sequence[sa.Index] | None = None,
    maintenance_work_mem: str | None = None,
    parallel_workers: int | None = None,
    wait: float = 0.0,
    on_progress: BuildProgress | None = None,
    stop: threading.Event | None = None,
) -> list[str]:
    """Build the new column's indexes concurrently, after the bulk of its vectors is there.

    Building afterwards is many times faster than keeping an index up to date during the backfill.

    Args:
        engine: where.
        column: the new column, or the old one.
        indexes: the indexes to build, as declared; by default one like each of the old column's.
        maintenance_work_mem: see ``build_index``.
        parallel_workers: see ``build_index``.
        wait: see ``build_index``.
        on_progress: see ``build_index``.
        stop: see ``build_index``.

    Returns:
        Names of the new column's indexes, those that were there included.

    Raises:
        TableBusyError: a lock could not be had, or another session is building the index.
        StepStoppedError: ``stop`` was set.
    """
    with engine.connect() as connection:
        pair = pair_of(connection, column)
        connection.rollback()
    wanted = list(indexes) if indexes is not None else likened(pair)
    for index in wanted:
        build_index(
            engine,
            index,
            maintenance_work_mem=maintenance_work_mem,
            parallel_workers=parallel_workers,
            wait=wait,
            on_progress=on_progress,
            stop=stop,
        )
    there = [index.name for index in pair.new.indexes if index.valid]
    return list(dict.fromkeys([*there, *(str(index.name) for index in wanted)]))


def likened(pair: Pair) -> list[sa.Index]:
    """For each of the old column's valid indexes, one of its kind on the new column.

    An index that the new column has already, of the same form, stands for it.
    """
    if pair.old is None:
        return []
    found, forms = [], {index.form for index in pair.new.indexes if index.valid}
    for index in pair.old.indexes:
        if not index.valid or index.form in forms:
            continue
        new = pair.new.binding.column
        name = index_name(index.name, pair.old.binding.column, new, pair.table.name)
        found.append(index.on(pair.new.column, name))
    return found
