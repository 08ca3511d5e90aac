"""Digests for vectors that are there already: adopted ones, and ones computed from another column.

Both walk a table in the order of its key, in short transactions that lock free rows only, and say
of each vector what this library's own writes say of theirs: whose it is, and of which text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from sbert_pg.catalog import Binding, rows
from sbert_pg.catalog.record import Named
from sbert_pg.sqlstates import sqlstate_of
from sbert_pg.system import Pause

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
    walk = _Walk(engine, binding, table, vector, criteria, block)
    written = 0
    pause = Pause(0.2, 3.0)
    for _ in range(PASSES):
        last: Sequence[Any] | None = None
        while True:
            count, last = walk.step(last)
            written += count
            if progress is not None:
                progress(written)
            if last is None:
                break
        if not walk.remain():
            break
        pause.sleep()
    return written


class _Walk:
    """The statements of one walk over a table."""

    def __init__(
        self,
        engine: sa.Engine,
        binding: Binding,
        table: sa.TableClause,
        vector: sa.ColumnElement[Any],
        criteria: Sequence[sa.ColumnElement[bool]],
        block: int,
    ) -> None:
        self.engine = engine.execution_options(isolation_level="READ COMMITTED")
        self.binding = binding
        self.table = table
        self.keys = [table.c[name] for name in binding.key_columns]
        self.block = block
        self.criteria = criteria
        read = dict.fromkeys([*binding.key_columns, *binding.source.columns])
        self.free = (
            sa.select(*(table.c[name] for name in read), vector.label(binding.column))
            .where(*criteria)
            .order_by(*self.keys)
            .limit(block)
            .with_for_update(key_share=True, skip_locked=True)
        )

    def step(self, last: Sequence[Any] | None) -> tuple[int, list[Any] | None]:
        """Write one block; how many rows, and its last key, ``None`` where it was the last one."""
        statement = self._statement(last)
        pause = Pause(0.2, 3.0)
        for number in range(1, PASSES + 1):
            try:
                with self.engine.begin() as connection:
                    row = connection.execute(statement).first()
                break
            except sa.exc.DBAPIError as error:
                if sqlstate_of(error) not in _REPEATED or number == PASSES:
                    raise
            pause.sleep()
        if row is None:
            return 0, None
        count, locked, *key = row
        return count, key if locked == self.block else None

    def _statement(self, last: Sequence[Any] | None) -> sa.Select[Any]:
        binding = self.binding
        free = self.free if last is None else self.free.where(rows.after(self.keys, last))
        locked = free.cte("locked")
        same = [key == locked.c[key.name] for key in self.keys]
        written = (
            sa.update(self.table)
            .where(*same)
            .values(
                {
                    self.table.c[binding.column]: locked.c[binding.column],
                    self.table.c[binding.companion]: binding.expressions.on(locked, "digest"),
                }
            )
            .returning(sa.literal(1).label("one"))
            .cte("written")
        )
        keys = [locked.c[key.name] for key in self.keys]
        count = sa.select(sa.func.count()).select_from(written).scalar_subquery()
        total = sa.select(sa.func.count()).select_from(locked).scalar_subquery()
        return sa.select(count, total, *keys).order_by(*(key.desc() for key in keys)).limit(1)

    def remain(self) -> bool:
        """Whether rows are left that could be written."""
        left = sa.select(sa.literal(1)).select_from(self.table).where(*self.criteria).limit(1)
        with self.engine.connect() as connection:
            return connection.execute(left).first() is not None
