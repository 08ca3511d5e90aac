"""The statements behind the operations, online and for ``--sql`` alike, and how they are run.

Beside live traffic they run outside the migration's transaction, and wait for locks in moments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects.postgresql import JSONB, REGCLASS
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

from sbert_pg import system
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import ReembeddingError
from sbert_pg.sqlstates import translated
from sbert_pg.system import (
    ATTEMPTS,
    LOCK_TIMEOUT,
    ColumnIdentity,
    busy_message,
    milliseconds,
    retried,
    settings,
)
from sbert_pg.types.vector import VectorType


class _Json(sa.ColumnElement[Any]):
    """JSON as a constant.

    Not a parameter, which SQLAlchemy 2.0 renders for ``--sql`` with its backslashes doubled.
    """

    inherit_cache = False
    type = JSONB()

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.text = json.dumps(value, ensure_ascii=False)


@compiles(_Json)
def _write_json(element: _Json, compiler: SQLCompiler, **_: Any) -> str:
    text = "'" + element.text.replace("'", "''") + "'"
    # The driver reads a percent sign as the start of a parameter.
    return text.replace("%", "%%") if "format" in compiler.dialect.paramstyle else text


def _json(value: Mapping[str, Any]) -> sa.ColumnElement[Any]:
    return sa.cast(_Json(value), JSONB)


def call(function: str, identity: ColumnIdentity, *arguments: Any) -> sa.Select[Any]:
    """``SELECT sbert.<function>(table, column, ...)``, of the catalog's functions for columns."""
    named = getattr(sa.func.sbert, function)
    table = sa.literal(system.name_of(identity.schema, identity.table), sa.Text())
    return sa.select(named(sa.cast(table, REGCLASS), identity.column, *arguments))


def bind(identity: ColumnIdentity, declared: Embedding, *, build: bool) -> sa.Select[Any]:
    """``SELECT sbert.bind_v1(...)``; without ``build`` its indexes are made by the caller."""
    return call(
        "bind_v1",
        identity,
        _json(declared.encoder.to_json()),
        _json(declared.source.to_json()),
        sa.null() if declared.replaces is None else declared.replaces,
        sa.false() if build else sa.true(),
    )


def require_valid(index: str, schema: str | None) -> sa.Select[Any]:
    """A query that fails, with what to do as its error, where an index is not valid."""
    stored = system.INDEX.c
    said = sa.literal(
        "an earlier build was interrupted; drop this index and run the script again: ", sa.Text()
    )
    # Nothing else fails with words of ours and without a function that has to be there. The name
    # comes from the row, so that the server cannot work it out, and fail, beforehand.
    name = sa.cast(sa.cast(stored.indexrelid, REGCLASS), sa.Text())
    return sa.select(
        sa.case((stored.indisvalid, 0), else_=sa.cast(said.concat(name), sa.Integer))
    ).where(stored.indexrelid == system.oid_of(system.name_of(schema, index)))


def alter_column(
    identity: ColumnIdentity,
    action: Literal["add", "drop", "rename"],
    *,
    type_: VectorType | None = None,
    new_name: str = "",
) -> system.Statement:
    """``ALTER TABLE ... ADD | DROP | RENAME COLUMN``; adding and dropping may be done before."""

    def write(compiler: Any) -> str:
        quote = compiler.preparer.quote
        column = quote(identity.column)
        done = {
            "add": f"ADD COLUMN IF NOT EXISTS {column} {type_ and type_.get_col_spec()}",
            "drop": f"DROP COLUMN IF EXISTS {column}",
            "rename": f"RENAME COLUMN {column} TO {new_name and quote(new_name)}",
        }
        table = system.ddl_name(compiler, identity.schema, identity.table)
        return f"ALTER TABLE {table} {done[action]}"

    return system.Statement(write)


def write(operations: Operations, statement: Any) -> None:
    """Write a statement into a script, whatever ``env.py`` says of parameters and their style."""
    compiled = statement.compile(dialect=system.PLAIN, compile_kwargs={"literal_binds": True})
    write_text(operations, f"{str(compiled).strip()};")


def write_text(operations: Operations, text: str) -> None:
    """Write what is text already into a script."""
    operations.migration_context.impl.static_output(text.strip())


class Online:
    """Statements of one operation on a table, given as text for ``regclass``.

    ``enclosed``: everything happens in a transaction that the application began, and which cannot
    be left. ``lock_timeout``: seconds that a statement waits for a lock at an attempt.
    """

    def __init__(
        self,
        operations: Operations,
        relation: str,
        *,
        enclosed: bool,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        self.operations = operations
        self.relation = relation
        self.enclosed = enclosed
        self.lock_timeout = lock_timeout

    @property
    def as_sql(self) -> bool:
        """Whether statements are written instead of executed."""
        return bool(self.operations.migration_context.as_sql)

    @property
    def connection(self) -> sa.Connection:
        """The migration's connection."""
        return self.operations.get_bind()

    def execute(self, statement: Any, *, attempts: int = ATTEMPTS) -> None:
        """Execute a statement, again where its lock cannot be had."""
        if self.as_sql:
            write(self.operations, statement)
            return

        def busy() -> str:
            return busy_message(self.connection, self.relation, attempts, self.lock_timeout)

        with translated():
            retried(lambda: self._once(statement), busy=busy, attempts=attempts)

    def _once(self, statement: Any) -> None:
        if not self.enclosed:
            self.connection.execute(statement)
            return
        # The transaction is the application's, so only the statement is taken back.
        with self.connection.begin_nested():
            self.connection.execute(statement)


@contextmanager
def online(
    operations: Operations, relation: str, *, lock_timeout: float = LOCK_TIMEOUT
) -> Iterator[Online]:
    """Leave the migration's transaction, after committing it, for statements of their own.

    Where ``env.py`` was given a connection in a transaction that Alembic did not begin, that one is
    not left: each statement is protected by a savepoint instead. The session's
    ``statement_timeout`` is set aside meanwhile.
    """
    values = {"lock_timeout": milliseconds(lock_timeout), "statement_timeout": "0"}
    enclosed = is_enclosed(operations)
    runner = Online(operations, relation, enclosed=enclosed, lock_timeout=lock_timeout)
    if enclosed:
        with setting(runner, values):
            yield runner
        return
    with operations.get_context().autocommit_block(), setting(runner, values):
        yield runner


@contextmanager
def within(operations: Operations, relation: str) -> Iterator[Online]:
    """Stay in the migration's transaction, and yet wait for a lock no longer than a moment.

    Each attempt is taken back to a savepoint, so whoever queues behind it has its turn.
    """
    runner = Online(operations, relation, enclosed=True)
    if runner.as_sql:
        yield runner
        return
    values = {"lock_timeout": milliseconds(LOCK_TIMEOUT), "statement_timeout": "0"}
    with setting(runner, values):
        yield runner


def is_enclosed(operations: Operations) -> bool:
    """Whether the connection was in a transaction before Alembic was given it; refused where
    unknown.
    """
    context = operations.migration_context
    if context.as_sql:
        return False
    try:
        # Alembic does not say whether the transaction is its own: begin_transaction() answers alike
        # with a transaction per migration, and autocommit_block() fails in an assertion.
        return bool(context._in_external_transaction)
    except AttributeError:
        raise ReembeddingError(
            "This release of Alembic does not say whether it began the transaction itself, so "
            "nothing is committed here. Use another release, and report this one."
        ) from None


def require_left(operations: Operations, what: str) -> None:
    """Refuse what cannot happen inside a transaction."""
    if is_enclosed(operations):
        raise ReembeddingError(
            f"{what} happens outside of transactions, and the connection that env.py gives to "
            "context.configure() is in one that Alembic did not begin. Give it a fresh connection, "
            "as with engine.connect(), instead of engine.begin()."
        )


@contextmanager
def setting(runner: Online, values: Mapping[str, str]) -> Iterator[None]:
    """Server settings for a while, in a script as well; the session gets its own back."""
    if not runner.as_sql:
        with settings(runner.connection, values):
            yield
        return
    for name, value in values.items():
        write(runner.operations, sa.select(sa.func.set_config(name, value, sa.false())))
    yield
    for name in values:
        write(runner.operations, sa.text("RESET " + name))
