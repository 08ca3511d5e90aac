"""Vector indexes set aside while a column is filled, since each row of many would go into a graph.

Which they are stands as a comment on the column's queue, an index of the library's own, from before
anything is dropped until all are built again. So a process that is killed loses none: whoever fills
the column next builds what the comment names.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID, REGCLASS

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.errors import BackfillError
from sbert_pg.indexes import build_index, index_builder, vector_indexes
from sbert_pg.progress import Advance
from sbert_pg.sqlstates import Fault, fault_of, words_of
from sbert_pg.system import LOCK_TIMEOUT, ColumnIdentity, Statement, retried
from sbert_pg.types.indexed import VectorIndex

log = logging.getLogger("sbert_pg.loading")

#: What an index is built from, as plain data.
_PARTS = (
    "name", "column", "method", "form", "opclass", "options", "element", "predicate", "tablespace",
)  # fmt: skip


@contextmanager
def indexes_aside(
    engine: sa.Engine,
    column: ColumnIdentity | sa.Column[Any] | Binding,
    *,
    maintenance_work_mem: str | None = None,
    on_progress: Advance | None = None,
    stop: threading.Event | None = None,
) -> Iterator[tuple[str, ...]]:
    """Drop the vector indexes of a bound column, and build them when the block ends.

    Searches are right meanwhile, and slow: they compare every row. Readers and writers go on; both
    ends wait for older transactions, so commit what the block does within it::

        with indexes_aside(engine, Article.__table__.c.embedding):
            with engine.begin() as connection:
                load(connection, Article, rows)

    They are built as well where the block raises. Where the process is killed or interrupted they
    stay aside; the next block, or ``backfill``, builds them.

    Args:
        engine: of the owner of the table.
        column: a bound column.
        maintenance_work_mem, on_progress, stop: see ``build_index``.

    Yields:
        Names of what is aside, also by an earlier call.

    Raises:
        NotBoundError: the column is not bound.
        BackfillError: this role may not drop them; nothing was.
        TableBusyError: a lock could not be had.
        StepStoppedError: ``stop`` was set while one was built; it stays aside.
    """
    with engine.connect() as connection:
        identity = column.identity if isinstance(column, Binding) else column
        binding = catalog.require_binding(connection, identity)
    with building_aside(
        engine, binding, stop,
        maintenance_work_mem=maintenance_work_mem, on_progress=on_progress,
    ):  # fmt: skip
        yield set_aside(engine, binding)


@contextmanager
def building_aside(
    engine: sa.Engine, binding: Binding, stop: threading.Event | None, **options: Any
) -> Iterator[None]:
    """Build at the end of a block what is aside by then, by whomever, unless it was stopped."""
    try:
        yield
    except Exception:
        try:
            _build_aside(engine, binding, stop=stop, **options)
        except Exception as error:  # The other says what went wrong first.
            log.warning("Vector indexes of %s are aside still: %s", binding, words_of(error))
        raise
    if stop is not None and stop.is_set():
        aside = _noted_at_the_end(engine, binding)
        if aside:
            words = "Vector indexes of %s are aside until a backfill is complete: %s"
            log.warning(words, binding, ", ".join(aside))
        return
    _build_aside(engine, binding, stop=stop, **options)


def names_aside(connection: sa.Connection, binding: Binding) -> tuple[str, ...]:
    """Names of what is set aside: by a block that goes on, or that ended before it built."""
    return tuple(_noted(connection, binding)[1])


def set_aside(engine: sa.Engine, binding: Binding) -> tuple[str, ...]:
    """Drop the vector indexes of a column, and note what they were; see ``indexes_aside``."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        queue, aside = _noted(connection, binding)
        stored = [
            index
            for index in vector_indexes(
                connection, binding.table, binding.column, schema=binding.schema
            )
            if index.valid
        ]
        if not stored:
            return tuple(aside)
        aside |= {index.name: {part: getattr(index, part) for part in _PARTS} for index in stored}
        try:
            connection.execute(_comment(queue, json.dumps(aside)))
        except sa.exc.ProgrammingError as error:
            raise BackfillError(
                f"The vector indexes of {binding} cannot be set aside: {words_of(error)}. Fill it "
                "as the owner of the table, or beside them."
            ) from error
        # Of a partitioned table PostgreSQL drops an index under a lock that stops everybody.
        timeout = LOCK_TIMEOUT if binding.partitioned else None
        with index_builder(
            connection, binding.table, binding.schema, lock_timeout=timeout
        ) as builder:
            for index in stored:
                log.info("Index %s of %s is set aside", index.name, binding)
                builder.drop(index.name)
    return tuple(aside)


def _build_aside(engine: sa.Engine, binding: Binding, **options: Any) -> None:
    aside = _noted_at_the_end(engine, binding)
    for parts in aside.values():
        index = VectorIndex(table=binding.table, schema=binding.schema, **parts)
        # Others who have filled the column do the same.
        build_index(engine, index.to_index(), wait=math.inf, **options)
    if aside:
        with engine.begin() as connection:
            queue, now = _noted(connection, binding)
            # What another call has set aside meanwhile is its own affair.
            if now == aside:
                connection.execute(_comment(queue, None))


def _noted_at_the_end(engine: sa.Engine, binding: Binding) -> dict[str, Mapping[str, Any]]:
    """What was set aside, where the server may have been away while the column was filled."""

    def noted() -> dict[str, Mapping[str, Any]]:
        with engine.connect() as connection:
            return _noted(connection, binding)[1]

    return retried(noted, again=lambda error: fault_of(error) in (Fault.LOST, Fault.BUSY))


def _noted(connection: sa.Connection, binding: Binding) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The index of the column's queue, as SQL, and what was set aside, by name."""
    indexes = catalog.queue_indexes(connection, binding)
    existing = next(index.existing for index in indexes if index.kind == "queue")
    if existing is None:
        raise BackfillError(f"{binding} has no queue; bind it again, or run 'sbert-pg doctor'.")
    oid = sa.cast(sa.cast(existing, REGCLASS), OID)
    note = connection.scalar(sa.select(sa.func.obj_description(oid, "pg_class")))
    return existing, json.loads(str(note)) if str(note).startswith("{") else {}


def _comment(index: str, text: str | None) -> Statement:
    """``COMMENT ON INDEX``, of an index by its name as SQL."""

    def write(compiler: Any) -> str:
        sql = compiler.sql_compiler
        name = sql.process(sa.literal_column(index))
        literal = "NULL" if text is None else sql.render_literal_value(text, sa.String())
        return f"COMMENT ON INDEX {name} IS {literal}"

    return Statement(write)
