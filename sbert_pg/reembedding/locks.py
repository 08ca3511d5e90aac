"""DDL on a table in use: short lock time-outs, retries, and a word about who holds the lock.

A statement that waits for ``ACCESS EXCLUSIVE`` makes every later reader and writer of the table
wait behind it. So it waits a moment only, gives way, and tries again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy.ext.compiler import compiles

from sbert_pg.catalog import system
from sbert_pg.errors import TableBusyError

T = TypeVar("T")

#: Seconds that DDL waits for a lock before it gives way to those who queue behind it.
LOCK_TIMEOUT = 1.0
#: Attempts before the step is given up; with the pauses between them about two minutes.
ATTEMPTS = 40
_PAUSE = (0.2, 3.0)
#: ``lock_not_available`` and ``deadlock_detected``: nothing was changed, trying again is safe.
_RETRIED = frozenset({"55P03", "40P01"})


def sqlstate(error: sa.exc.DBAPIError) -> str | None:
    """The five-character code of a database error."""
    code: str | None = getattr(error.orig, "sqlstate", None)
    return code


def in_short_transactions(
    engine: sa.Engine,
    step: Callable[[sa.Connection], T],
    *,
    relation: str | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> T:
    """Run one step in a transaction of its own that never waits long for a lock.

    Args:
        engine: where.
        step: what to do; called anew at each attempt, and committed as a whole or not at all.
        relation: table that the step locks, as text for ``to_regclass``, for the message.
        lock_timeout: seconds that a statement waits for a lock.
        attempts: how often to try.

    Returns:
        What the step returns.

    Raises:
        TableBusyError: the lock was not to be had; the message names who holds it.
    """
    for attempt in range(1, attempts + 1):
        try:
            with engine.begin() as connection:
                set_lock_timeout(connection, lock_timeout)
                return step(connection)
        except sa.exc.DBAPIError as error:
            if sqlstate(error) not in _RETRIED:
                raise
            if attempt == attempts:
                raise TableBusyError(_who(engine, relation, attempts, lock_timeout)) from error
        pause(attempt)
    raise AssertionError("unreachable")


def operations_on(connection: sa.Connection) -> Operations:
    """Alembic's operations, for DDL that SQLAlchemy itself lacks."""
    return Operations(MigrationContext.configure(connection))


class LockTable(sa.schema.ExecutableDDLElement):
    """``LOCK TABLE ... IN ... MODE``."""

    def __init__(
        self, table: sa.Table, mode: Literal["ACCESS EXCLUSIVE", "SHARE UPDATE EXCLUSIVE"]
    ) -> None:
        self.table = table
        self.mode = mode


@compiles(LockTable, "postgresql")
def _lock_table(element: LockTable, compiler: Any, **_: Any) -> str:
    return f"LOCK TABLE {compiler.preparer.format_table(element.table)} IN {element.mode} MODE"


def set_lock_timeout(connection: sa.Connection, seconds: float, *, local: bool = True) -> None:
    """Set ``lock_timeout`` for the transaction, or for the session."""
    value = f"{round(seconds * 1000)}ms"
    connection.execute(sa.select(sa.func.set_config("lock_timeout", value, local)))


def pause(attempt: int) -> None:
    """Wait before the next attempt, longer each time and never in step with anybody else."""
    least, most = _PAUSE
    time.sleep(min(most, least * 1.5 ** (attempt - 1)) * random.uniform(0.7, 1.3))


def holders(connection: sa.Connection, relation: str) -> list[str]:
    """Who else has a lock on a table now, the longest transaction first, one line each."""
    locks, activity = system.LOCKS, system.ACTIVITY
    statement = (
        sa.select(
            activity.c.pid,
            activity.c.usename,
            activity.c.application_name,
            activity.c.state,
            sa.extract("epoch", sa.func.now() - activity.c.xact_start).label("seconds"),
        )
        .join_from(locks, activity, locks.c.pid == activity.c.pid)
        .where(
            locks.c.relation == system.oid_of(relation),
            locks.c.granted,
            activity.c.pid != sa.func.pg_backend_pid(),
        )
        .group_by(*activity.c["pid", "usename", "application_name", "state", "xact_start"])
        .order_by(activity.c.xact_start)
    )
    return [_line(row) for row in connection.execute(statement)]


def _line(row: Any) -> str:
    name = row.application_name or row.usename or "unnamed"
    age = f"{float(row.seconds):.0f} s" if row.seconds is not None else "an unknown time"
    return f"process {row.pid} ({name}, {row.state or 'state hidden'}, in a transaction for {age})"


def _who(engine: sa.Engine, relation: str | None, attempts: int, lock_timeout: float) -> str:
    found: list[str] = []
    if relation is not None:
        with engine.connect() as connection:
            found = holders(connection, relation)
    held = "; ".join(found[:5]) or "nobody now, so trying again may do"
    return (
        f"The lock on {relation or 'the table'} could not be had in {attempts} attempts of "
        f"{lock_timeout:g} s. It is held by: {held}. Nothing was changed; end the long transaction "
        "and run the same command again."
    )
