"""The life of a run: begun, failed, done, current; also where its process is killed.

A run holds an advisory lock for as long as its transaction lives. A run whose state is ``running``
and whose lock is free has lost its process, and the next look at the runs marks it as failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.errors import ClusteringError

#: Longest error text that a run keeps.
_ERROR_LENGTH = 2_000
_LOST = "the process of this run ended before the run did"


@contextmanager
def recorded_run(
    engine: sa.Engine, clustering: Clustering, values: dict[str, Any]
) -> Iterator[tuple[sa.Connection, int]]:
    """Record a run, and give the transaction that it works in and its number.

    The record is committed at once, so that others see that a run is under way. Everything else is
    committed together when the block ends. If it raises, the record says why and nothing else is
    left.
    """
    table = clustering.run_table
    fail_lost_runs(engine, clustering)
    with engine.connect() as work, work.begin():
        # A run thinks for minutes between two statements.
        work.execute(
            sa.select(sa.func.set_config("idle_in_transaction_session_timeout", "0", True))
        )
        number = _next_number(work, table)
        work.execute(sa.select(sa.func.pg_advisory_xact_lock(*_lock_key(work, table, number))))
        with engine.begin() as record:
            record.execute(sa.insert(table).values(id=number, state="running", **values))
        try:
            yield work, number
        except BaseException as error:
            work.rollback()
            with engine.begin() as record:
                _fail(record, table, number, f"{type(error).__name__}: {error}")
            raise


def fail_lost_runs(engine: sa.Engine, clustering: Clustering) -> list[int]:
    """Mark runs as failed whose process is gone; return their numbers.

    Raises:
        ClusteringError: the tables of the clustering are not in the database.
    """
    table, lost = clustering.run_table, []
    with engine.connect() as connection:
        with connection.begin():
            _lock_key(connection, table, 0)
            running = list(
                connection.scalars(sa.select(table.c.id).where(table.c.state == "running"))
            )
        for number in running:
            with connection.begin():
                key = _lock_key(connection, table, number)
                if connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(*key))):
                    lost += [number] * _fail(connection, table, number, _LOST)
    return lost


def finish(
    connection: sa.Connection,
    clustering: Clustering,
    number: int,
    values: dict[str, Any],
    *,
    make_current: bool,
) -> bool:
    """Mark a run as done and, unless a later one is current already, make it the current one."""
    table = clustering.run_table
    current = False
    if make_current:
        key = _lock_key(connection, table, 0)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(*key)))
        current = _switch(connection, clustering, number, only_later=True)
    connection.execute(
        sa.update(table)
        .where(table.c.id == number)
        .values(state="done", finished_at=sa.func.clock_timestamp(), is_current=current, **values)
    )
    return current


def make_current(connection: sa.Connection, clustering: Clustering, run_id: int) -> None:
    """Let readers see this run, an earlier one for example, from the commit on.

    Raises:
        ClusteringError: there is no such run of this column, or it is not done.
    """
    table = clustering.run_table
    state = connection.scalar(
        sa.select(table.c.state).where(
            table.c.id == run_id, table.c.column_name == clustering.column.name
        )
    )
    if state != "done":
        raise ClusteringError(
            f"Run {run_id} of {clustering.column} cannot be made the current one: "
            + ("there is no such run." if state is None else f"its state is {state!r}.")
        )
    key = _lock_key(connection, table, 0)
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(*key)))
    _switch(connection, clustering, run_id, only_later=False)
    connection.execute(sa.update(table).where(table.c.id == run_id).values(is_current=True))


def prune(connection: sa.Connection, clustering: Clustering, *, keep: int = 1) -> int:
    """Delete runs of this column, but the current one, running ones, and the latest ``keep``.

    Returns:
        How many were deleted, each with its clusters and assignments.
    """
    table = clustering.run_table
    mine = table.c.column_name == clustering.column.name
    idle = sa.and_(mine, table.c.state != "running", sa.not_(table.c.is_current))
    kept = sa.select(table.c.id).where(idle).order_by(table.c.id.desc()).limit(keep)
    deleted = connection.execute(sa.delete(table).where(idle, table.c.id.not_in(kept)))
    return int(deleted.rowcount)


def _switch(
    connection: sa.Connection, clustering: Clustering, number: int, *, only_later: bool
) -> bool:
    table = clustering.run_table
    current = sa.and_(table.c.is_current, table.c.column_name == clustering.column.name)
    found = connection.scalar(sa.select(table.c.id).where(current))
    if only_later and found is not None and found > number:
        return False
    connection.execute(sa.update(table).where(current).values(is_current=False))
    return True


def _fail(connection: sa.Connection, table: sa.Table, number: int, error: str) -> int:
    failed = connection.execute(
        sa.update(table)
        .where(table.c.id == number, table.c.state == "running")
        .values(state="failed", error=error[:_ERROR_LENGTH], finished_at=sa.func.clock_timestamp())
    )
    return int(failed.rowcount)


def _next_number(connection: sa.Connection, table: sa.Table) -> int:
    name = connection.dialect.identifier_preparer.format_table(table)
    sequence = sa.func.pg_get_serial_sequence(name, "id")
    return int(connection.scalar(sa.select(sa.func.nextval(sequence))) or 0)


def _lock_key(
    connection: sa.Connection, table: sa.Table, number: int
) -> tuple[sa.ColumnElement[int], sa.ColumnElement[int]]:
    """Two 32-bit numbers for one run of one table; run 0 stands for the switch of the table."""
    name = connection.dialect.identifier_preparer.format_table(table)
    oid = connection.scalar(
        sa.select(sa.cast(sa.cast(sa.func.to_regclass(name), OID), sa.BigInteger))
    )
    if oid is None:
        raise ClusteringError(
            f"The table {table.fullname!r} is not in this database. A migration creates it: "
            "alembic revision --autogenerate, then alembic upgrade head."
        )
    return (
        sa.literal(_signed(int(oid)), sa.Integer),
        sa.literal(_signed(number % (1 << 32)), sa.Integer),
    )


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number
