"""Digests for vectors that are there already: adopted ones, and ones computed from another column.

Both walk a table in the order of its key, in short transactions that lock free rows only, and say
of each vector what this library's own writes say of theirs: whose it is, and of which text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa

from sbert_pg.catalog import Binding, rows
from sbert_pg.catalog.record import Named
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.system import Pause, retried

#: Rows of one transaction.
BLOCK = 2_000
#: Passes over rows that others held locked, before those are left to a worker.
PASSES = 20
#: A row moved to another partition, or a deadlock: the transaction is made again.
_REPEATED = frozenset({"40001", "40P01"})


def current_snapshot(connection: sa.Connection) -> str:
    """The server's snapshot now, as text.

    Under a lock that keeps writers out every version of a row that is there belongs to it.
    """
    snapshot = sa.cast(sa.func.pg_current_snapshot(), sa.Text)
    return connection.execute(sa.select(snapshot)).scalar_one()


def _belongs_to(snapshot: str, xmin: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Whether the version of a row that a transaction made belongs to a snapshot.

    ``xmin`` has 32 bits and means the last transaction whose number ends in them. A version so
    old that a newer transaction has the same is taken for changed, which costs an encoding.
    """
    end = sa.func.pg_snapshot_xmax(sa.func.pg_current_snapshot())
    last = sa.cast(sa.cast(end, sa.Text), sa.BigInteger)
    width = sa.literal_column("4294967296", sa.BigInteger)
    number = last - last % width + sa.cast(sa.cast(xmin, sa.Text), sa.BigInteger)
    number = number - sa.case((number >= last, width), else_=0)
    whole = sa.cast(sa.cast(sa.func.greatest(number, 3), sa.Text), Named("xid8"))
    as_snapshot = sa.cast(sa.literal(snapshot, sa.Text), Named("pg_snapshot"))
    return sa.func.pg_visible_in_snapshot(whole, as_snapshot, type_=sa.Boolean)


def adopt_rows(
    engine: sa.Engine,
    binding: Binding,
    snapshot: str,
    apart: Sequence[Sequence[Any]],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the digest of each row that belongs to a snapshot, for the vector that it has.

    The vectors are proven to be the encoder's as of the snapshot; a row written since may have
    another text. Rows whose keys stand ``apart`` are left out. Returns how many have their digest.
    """
    table = binding.clause()
    xmin: sa.ColumnClause[Any] = sa.column("xmin")
    table.append_column(xmin)
    criteria = [
        binding.is_stale(table),
        table.c[binding.column].is_not(None),
        binding.expressions.on(table, "text").is_not(None),
        _belongs_to(snapshot, xmin),
    ]
    if apart:
        keys = [table.c[name] for name in binding.key_columns]
        values = [[sa.literal(v, k.type) for v, k in zip(row, keys, strict=True)] for row in apart]
        criteria.append(sa.tuple_(*keys).not_in([sa.tuple_(*row) for row in values]))
    return write_digests(
        engine, binding, table, table.c[binding.column], criteria, progress=progress
    )


def write_digests(
    engine: sa.Engine,
    binding: Binding,
    table: sa.TableClause,
    vector: sa.ColumnElement[Any],
    criteria: Sequence[sa.ColumnElement[bool]],
    *,
    block: int = BLOCK,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write vector and digest of all rows that meet some criteria, computed by the server.

    A row that was written does not meet them any more. Rows that others hold locked are tried
    again, some times, and then left. Returns how many were written.
    """
    engine = engine.execution_options(isolation_level="READ COMMITTED")
    keys = [table.c[name] for name in binding.key_columns]
    read = dict.fromkeys([*binding.key_columns, *binding.source.columns])
    free = (
        sa.select(*(table.c[name] for name in read), vector.label(binding.column))
        .where(*criteria)
        .order_by(*keys)
        .limit(block)
        .with_for_update(key_share=True, skip_locked=True)
    )
    left = sa.select(sa.literal(1)).select_from(table).where(*criteria).limit(1)

    def first(statement: sa.Select[Any]) -> Any:
        with engine.begin() as connection:
            return connection.execute(statement).first()

    written = 0
    pause = Pause(0.2, 3.0)
    for _ in range(PASSES):
        here = free
        while True:
            write = partial(first, _writing(binding, table, here.cte("locked")))
            row = retried(write, again=_is_repeated, attempts=PASSES)
            count, locked, *last = row or (0, 0)
            written += count
            if progress is not None:
                progress(written)
            if locked < block:
                break
            here = free.where(rows.after(keys, last))
        if first(left) is None:
            break
        pause.sleep()
    return written


def _is_repeated(error: sa.exc.DBAPIError) -> bool:
    return sqlstate_of(error) in _REPEATED


def _writing(binding: Binding, table: sa.TableClause, locked: sa.CTE) -> sa.Select[Any]:
    """Write locked rows; how many were written, how many are locked, and the key of the last."""
    written = (
        sa.update(table)
        .where(*(table.c[name] == locked.c[name] for name in binding.key_columns))
        .values(
            {
                table.c[binding.column]: locked.c[binding.column],
                table.c[binding.companion]: binding.expressions.on(locked, "digest"),
            }
        )
        .returning(sa.literal(1).label("one"))
        .cte("written")
    )
    keys = [locked.c[name] for name in binding.key_columns]
    count = sa.select(sa.func.count()).select_from(written).scalar_subquery()
    total = sa.select(sa.func.count()).select_from(locked).scalar_subquery()
    return sa.select(count, total, *keys).order_by(*(key.desc() for key in keys)).limit(1)
