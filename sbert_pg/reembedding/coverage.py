"""How many rows of a column have the vector that they should have."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from sbert_pg.catalog import Binding, tables
from sbert_pg.reembedding.report import Coverage
from sbert_pg.reembedding.rules import LAG


def coverage_of(connection: sa.Connection, binding: Binding) -> Coverage:
    """Count a column's rows, over the whole table, and its marks.

    Args:
        connection: where.
        binding: the column.
    """
    table, pending = binding.clause(), tables.pending
    has_text = sa.or_(*(table.c[name].is_not(None) for name in binding.source.columns))
    has_vector = table.c[binding.column].is_not(None)
    recent = sa.exists().where(
        pending.c.column_id == binding.id,
        pending.c.key == binding.key_text(table),
        sa.not_(pending.c.failed),
        pending.c.marked_at > sa.func.now() - dt.timedelta(seconds=LAG),
    )
    counted = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(has_text),
            sa.func.count().filter(has_text, has_vector),
            sa.func.count().filter(has_text, sa.not_(has_vector), sa.not_(recent)),
        ).select_from(table)
    ).one()
    marks = connection.execute(
        sa.select(
            sa.func.count().filter(sa.not_(pending.c.failed)),
            sa.func.count().filter(pending.c.failed),
        ).where(pending.c.column_id == binding.id)
    ).one()
    return Coverage(
        rows=counted[0],
        with_text=counted[1],
        embedded=counted[2],
        overdue=counted[3],
        pending=marks[0],
        failed=marks[1],
    )
