"""Is a column ready? Its rows counted by what they say, and the check at the start of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding
from sbert_pg.errors import BackfillIncompleteError, NotBoundError
from sbert_pg.freshness import counts
from sbert_pg.indexes import vector_indexes
from sbert_pg.row_vectors import EmbeddingColumn, embedding_columns
from sbert_pg.types.indexed import method_of

#: Rows up to which a check counts what is missing; beyond, "more than" is enough.
COUNTED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many rows of a column are as they should be, by what the rows themselves say.

    Attributes:
        rows: rows of the table; ``None`` where they were not counted.
        backfill: rows that were there before the column and wait for their first vector.
        pending: new and changed rows that wait for their vector.
        failed: rows whose text could not be encoded, skipped ones included.
        capped: whether the last three stopped at ``COUNTED``.
        faults: what is wrong with the column's queue and binding, in words.
    """

    rows: int | None
    backfill: int
    pending: int
    failed: int
    capped: bool = False
    faults: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """Rows that wait for a vector."""
        return self.backfill + self.pending

    @property
    def share(self) -> float:
        """Share of the rows that are fresh; 1 for a table without any."""
        if not self.rows:
            return 1.0 if self.rows == 0 else float("nan")
        return max(0.0, 1 - (self.missing + self.failed) / self.rows)

    @property
    def fresh(self) -> int:
        """Rows that have the vector of their text, or no text."""
        return max(0, (self.rows or 0) - self.missing - self.failed)

    def __str__(self) -> str:
        parts = [f"{self.share:.2%}: {self.fresh:,} of {self.rows:,} rows fresh"]
        parts += [
            f"{number:,} {what}"
            for number, what in (
                (self.backfill, "not filled yet"),
                (self.pending, "pending"),
                (self.failed, "failed"),
            )
            if number
        ]
        return "; ".join([", ".join(parts), *self.faults])

    def count(self, number: int) -> str:
        """A number of rows in words, of how many where that is known."""
        words = f"more than {number:,}" if self.capped and number == COUNTED else f"{number:,}"
        return words if self.rows is None else f"{words} of {self.rows:,}"

    def reasons(self, max_pending: int | None = 0, max_failed: int | None = 0) -> Iterator[str]:
        """Why the column is not complete, in words; nothing where it is.

        Args:
            max_pending: new and changed rows that may wait; any number for ``None``.
            max_failed: rows that may have failed; any number for ``None``.
        """
        yield from self.faults
        if self.backfill:
            yield f"{self.count(self.backfill)} rows have no vector yet"
        if max_pending is not None and self.pending > max_pending:
            yield f"{self.count(self.pending)} rows are pending"
        if max_failed is not None and self.failed > max_failed:
            yield (
                f"the text of {self.count(self.failed)} rows could not be encoded (see 'sbert-pg "
                "failed', with --retry or --skip)"
            )


def coverage_of(connection: sa.Connection, binding: Binding, *, whole: bool = True) -> Coverage:
    """Count a column's rows by their state.

    Args:
        whole: count everything, the table's rows too; otherwise only what is missing, up to
            ``COUNTED`` rows, which reads nothing but two small indexes.
    """
    faults = tuple(catalog.health(connection, binding))
    counted = counts(connection, binding, None if whole else COUNTED)
    total = sa.select(sa.func.count()).select_from(binding.clause())
    return Coverage(
        rows=connection.execute(total).scalar_one() if whole else None,
        backfill=counted.backfill,
        pending=counted.pending,
        failed=counted.failed + counted.skipped,
        capped=counted.capped,
        faults=faults,
    )


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
        EncoderMismatchError: a column belongs to another encoder than the code declares.
        NotBoundError: a column is not bound, or does not exist.
        BackfillIncompleteError: rows or indexes are missing; all columns' reasons together.
    """
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
        connection.rollback()


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
