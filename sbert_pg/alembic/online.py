"""Run statements beside live traffic: outside the migration's transaction, with short waits.

A statement that waits for ``ACCESS EXCLUSIVE`` makes every later reader and writer of the table
wait behind it. So it waits a moment only, gives way, and tries again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import postgresql

from sbert_pg.catalog.sqlstates import translated
from sbert_pg.errors import ReembeddingError, TableBusyError
from sbert_pg.reembedding.locks import ATTEMPTS, LOCK_TIMEOUT, holders, pause, sqlstate

#: ``lock_not_available`` and ``deadlock_detected``: nothing was changed, trying again is safe.
RETRIED = frozenset({"55P03", "40P01"})


def write(operations: Operations, statement: Any) -> None:
    """Write a statement into a script, whatever ``env.py`` says of parameters and their style."""
    # A style of parameters that leaves percent signs alone.
    dialect = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
    compiled = statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    operations.migration_context.impl.static_output(f"{str(compiled).strip()};")


class Online:
    """Statements of one operation.

    Attributes:
        operations: Alembic's, of the running migration.
        relation: the table, as text for ``regclass``.
        enclosed: whether everything happens in a transaction that the application began itself, and
            which cannot be left.
    """

    def __init__(self, operations: Operations, relation: str, *, enclosed: bool) -> None:
        self.operations = operations
        self.relation = relation
        self.enclosed = enclosed

    @property
    def as_sql(self) -> bool:
        """Whether statements are written instead of executed."""
        return bool(self.operations.migration_context.as_sql)

    @property
    def connection(self) -> sa.Connection:
        """The migration's connection."""
        return self.operations.get_bind()

    def execute(self, statement: Any, *, attempts: int = ATTEMPTS) -> Any:
        """Execute a statement, again where its lock cannot be had.

        Raises:
            TableBusyError: the lock was not to be had; the message says who holds it.
        """
        if self.as_sql:
            write(self.operations, statement)
            return None
        for attempt in range(1, attempts + 1):
            try:
                return self._once(statement)
            except sa.exc.DBAPIError as error:
                if sqlstate(error) not in RETRIED:
                    with translated():
                        raise
                if attempt == attempts:
                    raise TableBusyError(self._busy(attempts)) from error
            pause(attempt)
        raise AssertionError("unreachable")

    def scalar(self, statement: Any) -> Any:
        """The first value of a query; not for ``--sql``."""
        return self.connection.execute(statement).scalar()

    def _once(self, statement: Any) -> Any:
        connection = self.connection
        if not self.enclosed:
            result = connection.execute(statement)
            return result.scalar() if result.returns_rows else None
        # The transaction is somebody else's, so only the statement is taken back.
        with connection.begin_nested():
            result = connection.execute(statement)
            return result.scalar() if result.returns_rows else None

    def _busy(self, attempts: int) -> str:
        held = "; ".join(holders(self.connection, self.relation)[:5])
        return (
            f"The lock on {self.relation} could not be had in {attempts} attempts. It is held by: "
            f"{held or 'nobody now, so trying again may do'}. End the long transaction and run the "
            "same migration again; the steps that are done are passed over."
        )


@contextmanager
def online(
    operations: Operations, relation: str, *, lock_timeout: float = LOCK_TIMEOUT
) -> Iterator[Online]:
    """Leave the migration's transaction, after committing it, for statements of their own.

    Where ``env.py`` was given a connection in a transaction that Alembic did not begin, that one is
    not left: each statement is protected by a savepoint instead.

    Args:
        operations: of the running migration.
        relation: the table, as text for ``regclass``.
        lock_timeout: seconds that a statement waits for a lock at an attempt.
    """
    enclosed = is_enclosed(operations)
    setting = {"lock_timeout": f"{round(lock_timeout * 1000)}ms"}
    if enclosed:
        runner = Online(operations, relation, enclosed=True)
        with settings(runner, setting):
            yield runner
        return
    with operations.get_context().autocommit_block():
        runner = Online(operations, relation, enclosed=False)
        with settings(runner, setting):
            yield runner


@contextmanager
def within(operations: Operations, relation: str) -> Iterator[Online]:
    """Stay in the migration's transaction, and yet wait for a lock no longer than a moment.

    Each attempt is taken back to a savepoint, so whoever queues behind it has its turn.

    Args:
        operations: of the running migration.
        relation: the table, as text for ``regclass``.
    """
    runner = Online(operations, relation, enclosed=True)
    if runner.as_sql:
        yield runner
        return
    with settings(runner, {"lock_timeout": f"{round(LOCK_TIMEOUT * 1000)}ms"}):
        yield runner


def is_enclosed(operations: Operations) -> bool:
    """Whether the connection was in a transaction before Alembic was given it."""
    context = operations.migration_context
    return not context.as_sql and bool(getattr(context, "_in_external_transaction", False))


def require_left(runner: Online, what: str) -> None:
    """Refuse what cannot happen inside a transaction.

    Raises:
        ReembeddingError: the application's own transaction encloses the migration.
    """
    if runner.enclosed:
        raise ReembeddingError(
            f"{what} happens outside of transactions, and the connection that env.py gives to "
            "context.configure() is in one that Alembic did not begin. Give it a fresh connection, "
            "as with engine.connect(), instead of engine.begin()."
        )


@contextmanager
def settings(runner: Online, wanted: Mapping[str, str]) -> Iterator[None]:
    """Server settings for a while; the session has its own again afterwards."""
    if runner.as_sql:
        for name, value in wanted.items():
            write(runner.operations, sa.select(sa.func.set_config(name, value, sa.false())))
        yield
        for name in wanted:
            write(runner.operations, sa.text("RESET " + _known(name)))
        return
    connection = runner.connection
    before = {
        name: connection.execute(sa.select(sa.func.current_setting(name))).scalar_one()
        for name in wanted
    }
    _set(connection, wanted)
    try:
        yield
    finally:
        # A transaction that has failed takes its settings with it.
        if not connection.invalidated and not (runner.enclosed and _failed(connection)):
            _set(connection, before)


def _set(connection: sa.Connection, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        connection.execute(sa.select(sa.func.set_config(name, value, False)))


def _failed(connection: sa.Connection) -> bool:
    try:
        connection.execute(sa.select(sa.literal(1)))
    except sa.exc.DBAPIError:
        return True
    return False


def _known(name: str) -> str:
    if name not in ("lock_timeout", "maintenance_work_mem"):
        raise ValueError(f"unexpected setting {name!r}")
    return name
