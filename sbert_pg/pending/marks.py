"""Marks made and settled by hand: everything anew, failures tried again, rows left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog import PENDING_CHANNEL, Binding, attest, tables
from sbert_pg.catalog.sqlstates import translated

#: What an operator's decision reads like in ``sbert.pending.error``.
SKIPPED = "skipped by an operator"

_mark = tables.pending.c


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that could not be embedded.

    Attributes:
        key: its key, as ``sbert.pending`` has it.
        attempts: how often it was tried.
        error: why it failed the last time.
        marked_at: when its text changed.
        skipped: whether an operator has decided to leave it.
    """

    key: str
    attempts: int
    error: str | None
    marked_at: datetime
    skipped: bool


def mark_all(connection: Connection, binding: Binding, *, missing_only: bool = False) -> int:
    """Mark rows of a column pending, for workers to embed anew.

    One statement in the connection's transaction: two to four seconds for a million rows, while
    which writers of rows that are being marked may wait. For filling a large table a backfill is
    the better way.

    Args:
        connection: a connection; the caller commits.
        binding: the column.
        missing_only: only rows that have a text and no vector, or a vector and no text.

    Returns:
        The number of rows that were not marked already. Failed rows are tried again.
    """
    call = sa.func.sbert.mark_pending_v1(binding.id, not missing_only)
    with translated():
        return int(connection.execute(sa.select(call)).scalar_one())


def mark(connection: Connection, binding: Binding, keys: Sequence[str]) -> int:
    """Mark some rows pending, by their keys; the caller commits.

    Returns:
        The number of rows that were not pending already; failed ones are tried again.
    """
    if not keys:
        return 0
    # In the order of the keys, so that two who do this at once cannot wait for each other.
    given = sa.func.unnest(sa.cast(sorted(set(keys)), pg.ARRAY(sa.Text)))
    rows = sa.select(sa.literal(binding.id), given)
    insert = pg.insert(tables.pending).from_select(["column_id", "key"], rows)
    fresh = {column.name: None for column in (_mark.lease_until, _mark.claimed_by, _mark.error)}
    again = insert.on_conflict_do_update(
        index_elements=["column_id", "key"],
        set_={
            "version": insert.excluded.version,
            "attempts": 0,
            "failed": False,
            "skipped": False,
            "next_attempt_at": None,
            **fresh,
        },
        where=_mark.failed,
    )
    marked = len(connection.execute(again.returning(_mark.key)).all())
    _wake(connection, binding)
    return marked


def failures(
    connection: Connection, binding: Binding, *, limit: int = 100, skipped: bool = False
) -> list[Failure]:
    """Rows of a column that could not be embedded, longest first.

    Args:
        connection: a connection.
        binding: the column.
        limit: most rows to return.
        skipped: include rows that an operator has decided to leave.
    """
    wanted = (
        sa.select(_mark.key, _mark.attempts, _mark.error, _mark.marked_at, _mark.skipped)
        .where(_mark.column_id == binding.id, _mark.failed)
        .order_by(_mark.marked_at, _mark.key)
        .limit(limit)
    )
    if not skipped:
        wanted = wanted.where(~_mark.skipped)
    return [Failure(*row) for row in connection.execute(wanted)]


def retry(connection: Connection, binding: Binding, keys: Sequence[str] | None = None) -> int:
    """Let workers try failed rows again; the caller commits.

    Args:
        connection: a connection.
        binding: the column.
        keys: which rows, skipped ones too; by default all that have failed and are not skipped.

    Returns:
        The number of rows.
    """
    again = (
        sa.update(tables.pending)
        .values(failed=False, skipped=False, attempts=0, next_attempt_at=None)
        .where(
            _mark.column_id == binding.id,
            _mark.failed,
            _chosen(None) if keys is None else _is_one_of(keys),
        )
    )
    count = connection.execute(again).rowcount
    if count:
        _wake(connection, binding)
    return count


def skip(connection: Connection, binding: Binding, keys: Sequence[str] | None = None) -> int:
    """Leave rows that cannot be embedded without a vector; the caller commits.

    An older vector is cleared, so that a search does not find the row by a text it no longer has.
    The row stays visible as skipped until its text changes or it is tried again.

    Args:
        connection: a connection of a role that may update the table.
        binding: the column.
        keys: which rows, pending or failed; by default all that have failed.

    Returns:
        The number of rows.

    Raises:
        sqlalchemy.exc.IntegrityError: the column is ``NOT NULL``, so a row cannot be without.
    """
    wanted = sa.select(_mark.key).where(_mark.column_id == binding.id, _chosen(keys))
    if keys is None:
        wanted = wanted.where(_mark.failed)
    found = list(connection.execute(wanted).scalars())
    if not found:
        return 0
    # Rows before marks, as everywhere. Marks that have changed until then are not touched.
    _lock_rows(connection, binding, found)
    held = list(
        connection.execute(
            wanted.where(_is_one_of(found)).order_by(_mark.key).with_for_update()
        ).scalars()
    )
    table, named = binding.clause(), binding.unpacked(held)
    attest(connection, binding, verified=True)
    connection.execute(
        sa.update(table)
        .values({binding.column: sa.null()})
        .where(binding.matches(table, named), table.c[binding.column].is_not(None))
    )
    return connection.execute(
        sa.update(tables.pending)
        .values(
            failed=True,
            skipped=True,
            lease_until=None,
            claimed_by=None,
            # Another version, so that a worker who has the row in hand does not write it.
            version=tables.pending_version.next_value(),
            error=sa.func.concat_ws(": ", SKIPPED, _mark.error),
        )
        .where(_mark.column_id == binding.id, _is_one_of(held))
    ).rowcount


def _lock_rows(connection: Connection, binding: Binding, keys: Sequence[str]) -> None:
    table, named = binding.clause(), binding.unpacked(list(keys))
    connection.execute(
        sa.select(named.c.key)
        .join_from(named, table, binding.matches(table, named))
        .order_by(named.c.key)
        .with_for_update(of=table, key_share=True)
    )


def _chosen(keys: Sequence[str] | None) -> sa.ColumnElement[bool]:
    if keys is None:
        return ~_mark.skipped
    return sa.and_(_is_one_of(keys), ~_mark.skipped)


def _is_one_of(keys: Sequence[str]) -> sa.ColumnElement[bool]:
    return _mark.key == sa.any_(sa.cast(list(keys), pg.ARRAY(sa.Text)))


def _wake(connection: Connection, binding: Binding) -> None:
    notify: Any = sa.func.pg_notify(PENDING_CHANNEL, str(binding.id))
    connection.execute(sa.select(notify))


__all__ = ["SKIPPED", "Failure", "failures", "mark", "mark_all", "retry", "skip"]
