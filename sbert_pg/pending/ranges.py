"""Key ranges of a backfill, in the catalog: planned one at a time, leased, resumed.

Nobody has to look through the whole table first: a process that finds no free range plans the next
one behind the last. Ranges are (lower, upper] in the order of the key; the last one is open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog import keys
from sbert_pg.catalog.record import Binding
from sbert_pg.catalog.tables import backfill, pending
from sbert_pg.pending.rows import Row, Rows

#: First key of the advisory locks that are held while a range is planned: "bfil" in ASCII.
_LOCK = 0x6266696C


@dataclass(frozen=True, slots=True)
class Range:
    """A leased range.

    Attributes:
        id: its number.
        token: what it is leased under.
        upper: its last key; ``None`` where it is the last range.
        position: the last key that is done, or the key before the range; ``None`` at the start of
            the table.
    """

    id: int
    token: str
    upper: str | None
    position: str | None

    def after(self, position: str) -> Range:
        """The same, further on."""
        return replace(self, position=position)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a backfill has come, over all processes.

    Attributes:
        planned: ranges so far.
        done: ranges that are done.
        rows: rows that were written.
        covered: whether the ranges reach the end of the table.
    """

    planned: int
    done: int
    rows: int
    covered: bool

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.covered and self.planned == self.done


def take(
    connection: Connection, rows: Rows, *, token: str, span: int, lease: timedelta
) -> Range | None:
    """Lease a range: one that a process left, or a new one; the caller commits.

    Returns:
        ``None`` where every range is done or leased by others.
    """
    c = backfill.c
    column_id = rows.binding.id
    free = (
        sa.select(c.id)
        .where(
            c.column_id == column_id,
            c.state == "open",
            sa.or_(c.lease_until.is_(None), c.lease_until < sa.func.now()),
        )
        .order_by(c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    lent = {"lease_until": sa.func.now() + lease, "claimed_by": token}
    found = connection.execute(
        sa.update(backfill).values(lent).where(c.id == free).returning(*_fields())
    ).first()
    if found is None:
        found = _plan(connection, rows, span, lent)
    return None if found is None else Range(found.id, token, found.upper, found.position)


def _fields() -> tuple[sa.ColumnElement[Any], ...]:
    c = backfill.c
    return c.id, c.upper, sa.func.coalesce(c.position, c.lower).label("position")


def _plan(
    connection: Connection, rows: Rows, span: int, lent: dict[str, Any]
) -> sa.Row[Any] | None:
    """Make the range behind the last one, unless that one reaches the end."""
    c = backfill.c
    column_id = rows.binding.id
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK, column_id)))
    last = connection.execute(
        sa.select(c.upper).where(c.column_id == column_id).order_by(c.id.desc()).limit(1)
    ).first()
    if last is not None and last.upper is None:
        return None
    lower = None if last is None else last.upper
    table = rows.table
    upper = connection.execute(
        sa.select(rows.binding.key_text(table))
        .where(*_beyond(rows.binding, table, lower))
        .order_by(*_order(rows.binding, table))
        .offset(span - 1)
        .limit(1)
    ).scalar()
    values = {"column_id": column_id, "lower": lower, "upper": upper, "started_at": sa.func.now()}
    made = connection.execute(sa.insert(backfill).values({**values, **lent}).returning(*_fields()))
    return made.one()


def read(
    connection: Connection, rows: Rows, span: Range, limit: int
) -> tuple[list[Row], str | None]:
    """The next rows of a range that have a text and no vector.

    Returns:
        The rows, and the key up to which the range is done once they are written; ``None`` where
        that is its end.
    """
    table, binding = rows.table, rows.binding
    no_text = sa.and_(*(table.c[name].is_(None) for name in binding.source.columns))
    statement = (
        sa.select(
            binding.key_text(table).label("key"),
            sa.cast(table.c.xmin, sa.Text).label("stamp"),
            *rows.source_texts(),
        )
        .where(
            *_beyond(binding, table, span.position),
            *_up_to(binding, table, span.upper),
            table.c[binding.column].is_(None),
            ~no_text,
        )
        .order_by(*_order(binding, table))
        .limit(limit)
    )
    found = [rows.row(key, stamp, values) for key, stamp, *values in connection.execute(statement)]
    return found, found[-1].key if len(found) == limit else None


def advance(
    connection: Connection, span: Range, position: str | None, written: int, lease: timedelta
) -> bool:
    """Note that a range is done up to a key, or to its end; the caller commits.

    Returns:
        Whether the range is still leased under its token; if not, nothing is noted.
    """
    c = backfill.c
    values: dict[str, Any] = {"rows": c.rows + written}
    if position is None:
        values |= {"state": "done", "finished_at": sa.func.now(), "lease_until": None}
    else:
        values |= {"position": position, "lease_until": sa.func.now() + lease}
    result = connection.execute(
        sa.update(backfill)
        .values(values)
        .where(c.id == span.id, c.claimed_by == span.token, c.state == "open")
    )
    return result.rowcount == 1


def release(connection: Connection, tokens: Sequence[str]) -> None:
    """Give leased ranges back, to be resumed by anybody; the caller commits."""
    connection.execute(
        sa.update(backfill)
        .values(lease_until=None, claimed_by=None)
        .where(backfill.c.claimed_by.in_(tokens), backfill.c.state == "open")
    )


def extent(connection: Connection, column_id: int) -> Extent:
    """How far the backfill of a column has come."""
    c = backfill.c
    planned, done, rows, covered = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(c.state == "done"),
            sa.func.coalesce(sa.func.sum(c.rows), 0),
            sa.func.coalesce(sa.func.bool_or(c.upper.is_(None)), False),
        ).where(c.column_id == column_id)
    ).one()
    return Extent(planned, done, int(rows), covered)


def begin_again(connection: Connection, rows: Rows, *, force: bool = False) -> bool:
    """Forget the ranges of a backfill that is complete, if rows were left out; the caller commits.

    Args:
        connection: a connection.
        rows: the rows of the column.
        force: forget them even if no rows were left out, or it is not complete.

    Returns:
        Whether they were forgotten.
    """
    column_id = rows.binding.id
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK, column_id)))
    if not force and not (extent(connection, column_id).complete and left_out(connection, rows)):
        return False
    connection.execute(sa.delete(backfill).where(backfill.c.column_id == column_id))
    return True


def left_out(connection: Connection, rows: Rows) -> bool:
    """Whether a row has a text, no vector and no mark, as after its triggers were disabled."""
    table, binding = rows.table, rows.binding
    no_text = sa.and_(*(table.c[name].is_(None) for name in binding.source.columns))
    marked = sa.exists().where(
        pending.c.column_id == binding.id, pending.c.key == binding.key_text(table)
    )
    missing = sa.select(sa.literal(1)).where(table.c[binding.column].is_(None), ~no_text, ~marked)
    return connection.execute(missing.limit(1)).first() is not None


def _parts(binding: Binding, key: str) -> list[sa.ColumnElement[Any]]:
    texts = [key] if len(binding.key_columns) == 1 else json.loads(key)
    return [
        sa.cast(sa.literal(text, sa.Text), keys.Named(type_))
        for text, type_ in zip(texts, binding.key_types, strict=True)
    ]


def _order(binding: Binding, table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
    return [table.c[name] for name in binding.key_columns]


def _beyond(
    binding: Binding, table: sa.FromClause, key: str | None
) -> list[sa.ColumnElement[bool]]:
    if key is None:
        return []
    return [sa.tuple_(*_order(binding, table)) > sa.tuple_(*_parts(binding, key))]


def _up_to(binding: Binding, table: sa.FromClause, key: str | None) -> list[sa.ColumnElement[bool]]:
    if key is None:
        return []
    return [sa.tuple_(*_order(binding, table)) <= sa.tuple_(*_parts(binding, key))]


__all__ = [
    "Extent",
    "Range",
    "advance",
    "begin_again",
    "extent",
    "left_out",
    "read",
    "release",
    "take",
]
