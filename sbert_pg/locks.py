"""DDL on a table in use: short lock time-outs, retries, and who holds the lock.

A statement that waits for ``ACCESS EXCLUSIVE`` makes every later reader and writer of the table
wait behind it. So it waits a moment only, gives way, and tries again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa

from sbert_pg import system
from sbert_pg.errors import TableBusyError
from sbert_pg.sqlstates import DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE, sqlstate_of

T = TypeVar("T")

#: Seconds that DDL waits for a lock before it gives way to those who queue behind it.
LOCK_TIMEOUT = 1.0
#: Attempts before the step is given up; with the pauses between them about two minutes.
ATTEMPTS = 40
#: What a role or database may have for web requests, and would end a step that takes its time; a
#: shorter one than the lock's would also hide that it was the lock that was waited for.
_TIMEOUTS = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
)
_RETRIED = frozenset({LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED})


def is_busy(error: sa.exc.DBAPIError) -> bool:
    """Whether a lock could not be had: nothing was changed, and trying again is safe."""
    return sqlstate_of(error) in _RETRIED


def retried(attempt: Callable[[], T], *, busy: Callable[[], str], attempts: int = ATTEMPTS) -> T:
    """Call a function again where its lock cannot be had, with pauses.

    Args:
        attempt: the function; it changes nothing where it fails.
        busy: gives the message of the error, once all attempts have failed.

    Raises:
        TableBusyError: the lock was not to be had.
    """
    pause = Pause(0.2, 3.0)
    while True:
        attempts -= 1
        try:
            return attempt()
        except sa.exc.DBAPIError as error:
            if not is_busy(error):
                raise
            if attempts < 1:
                raise TableBusyError(busy()) from error
        pause.sleep()


def in_short_transactions(
    engine: sa.Engine,
    step: Callable[[sa.Connection], T],
    *,
    relation: str | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> T:
    """Run one step in its own transaction that never waits long for a lock.

    Other time-outs than the lock's, of a role or database, are set aside meanwhile.

    Args:
        step: what to do; called again at each attempt, and committed as a whole or not at all.
        relation: table that the step locks, as text for ``to_regclass``, for the message.
        lock_timeout: seconds that a statement waits for a lock.

    Raises:
        TableBusyError: the lock was not to be had; the message names who holds it.
    """

    def attempt() -> T:
        with engine.begin() as connection:
            set_timeouts_aside(connection)
            set_lock_timeout(connection, lock_timeout)
            return step(connection)

    def busy() -> str:
        with engine.connect() as connection:
            return busy_message(connection, relation, attempts, lock_timeout)

    return retried(attempt, busy=busy, attempts=attempts)


def milliseconds(seconds: float) -> str:
    """A time-out as the server's settings spell it."""
    return f"{round(seconds * 1000)}ms"


def configure(connection: sa.Connection, values: Mapping[str, str]) -> None:
    """Server settings until the transaction ends."""
    _set(connection, values, local=True)


def set_lock_timeout(connection: sa.Connection, seconds: float) -> None:
    """Set ``lock_timeout`` until the transaction ends."""
    configure(connection, {"lock_timeout": milliseconds(seconds)})


def set_timeouts_aside(connection: sa.Connection) -> None:
    """Set the time-outs that a role or database may have aside until the transaction ends."""
    known = sa.table("pg_settings", sa.column("name", sa.Text), schema="pg_catalog")
    statement = sa.select(sa.func.set_config(known.c.name, "0", True))
    connection.execute(statement.where(known.c.name.in_(_TIMEOUTS))).all()


@contextmanager
def settings(connection: sa.Connection, values: Mapping[str, str]) -> Iterator[None]:
    """Server settings of the session for a while; it has its own again afterwards."""
    before = {
        name: connection.execute(sa.select(sa.func.current_setting(name))).scalar_one()
        for name in values
    }
    _set(connection, values)
    try:
        yield
    finally:
        # A transaction that has failed takes its settings with it.
        if not connection.invalidated and not _failed(connection):
            _set(connection, before)


def _set(connection: sa.Connection, values: Mapping[str, str], *, local: bool = False) -> None:
    for name, value in values.items():
        connection.execute(sa.select(sa.func.set_config(name, value, local)))


def _failed(connection: sa.Connection) -> bool:
    try:
        connection.execute(sa.select(sa.literal(1)))
    except sa.exc.DBAPIError:
        return True
    return False


class Pause:
    """Waits that double from attempt to attempt, and are never in step with anybody else's.

    Args:
        first: the first wait, in seconds.
        longest: the longest.
    """

    def __init__(self, first: float = 0.1, longest: float = 30.0) -> None:
        self._first = self._next = first
        self._longest = longest

    def next(self) -> float:
        """The wait to take now."""
        wait = self._next
        self._next = min(self._next * 2, self._longest)
        return wait * random.uniform(0.75, 1.25)

    def sleep(self) -> None:
        """Take it."""
        time.sleep(self.next())

    def reset(self) -> None:
        """Begin with the first again."""
        self._next = self._first


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


def busy_message(
    connection: sa.Connection, relation: str | None, attempts: int, lock_timeout: float
) -> str:
    """What to say where a lock could not be had: who holds it, and what to do."""
    lines = [] if relation is None else holders(connection, relation)
    held = "; ".join(lines[:5]) or "no other session now, so trying again may do"
    return (
        f"The lock on {relation or 'the table'} could not be had in {attempts} attempts of "
        f"{lock_timeout:g} s. It is held by: {held}. Nothing was changed; end the long transaction "
        "and run the same command again."
    )
