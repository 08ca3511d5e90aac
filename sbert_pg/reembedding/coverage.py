"""How many rows of a column have the vector that they should have."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from sbert_pg.catalog import Binding, tables
from sbert_pg.reembedding.report import Coverage
from sbert_pg.reembedding.rules import LAG, overdue_of


def coverage_of(connection: sa.Connection, binding: Binding) -> Coverage:
    """Count a column's rows, over the whole table, and its marks.

    Args:
        connection: where.
        binding: the column.
    """
    table = binding.clause()
    has_text, has_vector = _conditions(binding, table)
    counted = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(has_text),
            sa.func.count().filter(has_text, has_vector),
            sa.func.count().filter(
                has_text, sa.not_(has_vector), _marked(binding, table, _recent())
            ),
        ).select_from(table)
    ).one()
    pending, failed = marks_of(connection, binding)
    return Coverage(
        rows=counted[0],
        with_text=counted[1],
        embedded=counted[2],
        overdue=overdue_of(*counted[1:]),
        pending=pending,
        failed=failed,
    )


def first_late(connection: sa.Connection, binding: Binding) -> str | None:
    """Key of some row that should have a vector by now, failed ones apart; ``None`` if none is.

    Stops at the first such row; where there is none it has read the table once, and where rows
    became pending in the last moment, once more to see that they are few.
    """
    if (late := _first_late(connection, binding, excuse_recent=True)) is not None:
        return late
    excused = sa.select(tables.pending.c.key).where(
        tables.pending.c.column_id == binding.id, _recent()
    )
    if connection.execute(excused.limit(1)).first() is None:
        return None
    if not coverage_of(connection, binding).late:
        return None
    return _first_late(connection, binding, excuse_recent=False)


def _first_late(connection: sa.Connection, binding: Binding, *, excuse_recent: bool) -> str | None:
    table = binding.clause()
    has_text, has_vector = _conditions(binding, table)
    failed = tables.pending.c.failed
    excused = sa.or_(_recent(), failed) if excuse_recent else failed
    key: str | None = connection.execute(
        sa.select(binding.key_text(table))
        .where(has_text, sa.not_(has_vector), sa.not_(_marked(binding, table, excused)))
        .limit(1)
    ).scalar()
    return key


def marks_of(connection: sa.Connection, binding: Binding) -> tuple[int, int]:
    """How many of a column's rows are pending, and how many have failed."""
    pending = tables.pending
    row = connection.execute(
        sa.select(
            sa.func.count().filter(sa.not_(pending.c.failed)),
            sa.func.count().filter(pending.c.failed),
        ).where(pending.c.column_id == binding.id)
    ).one()
    return row[0], row[1]


def _conditions(
    binding: Binding, table: sa.TableClause
) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    has_text = sa.or_(*(table.c[name].is_not(None) for name in binding.source.columns))
    return has_text, table.c[binding.column].is_not(None)


def _recent() -> sa.ColumnElement[bool]:
    pending = tables.pending.c
    since = sa.func.now() - dt.timedelta(seconds=LAG)
    return sa.and_(sa.not_(pending.failed), pending.marked_at > since)


def _marked(
    binding: Binding, table: sa.TableClause, which: sa.ColumnElement[bool]
) -> sa.ColumnElement[bool]:
    pending = tables.pending.c
    return sa.exists().where(
        pending.column_id == binding.id, pending.key == binding.key_text(table), which
    )
