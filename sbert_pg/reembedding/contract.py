"""Contract and abort: one of a change's two columns goes, and the other stays as if alone."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.catalog import Binding, system, tables
from sbert_pg.errors import BackfillIncompleteError, ReembeddingError
from sbert_pg.reembedding.checks import facts_of, require_unused
from sbert_pg.reembedding.locks import (
    ATTEMPTS,
    LOCK_TIMEOUT,
    LockTable,
    in_short_transactions,
    operations_on,
)
from sbert_pg.reembedding.pair import Pair, pair_of, replacement_of
from sbert_pg.reembedding.rules import joined, next_step, unready
from sbert_pg.reembedding.usage import QUIET
from sbert_pg.types.guard import ColumnIdentity


def finish(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    force: bool = False,
    quiet: dt.timedelta = QUIET,
    watch: float = 0.0,
    max_failed: int = 0,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> bool:
    """Contract: unbind and drop the old column with its indexes, in one transaction.

    ``DROP COLUMN`` takes ``ACCESS EXCLUSIVE`` for an instant, rewrites nothing and waits for the
    lock no longer than ``lock_timeout`` at a time.

    Args:
        engine: where.
        column: the new column, or the old one.
        force: drop it although it is still in use. Completeness is required all the same.
        quiet: how long the old column must not have been used.
        watch: seconds to watch it first.
        max_failed: rows allowed whose text could not be encoded.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        Whether it was dropped now; ``False`` where the change had been finished before.

    Raises:
        BackfillIncompleteError: the new column is not complete, or lacks its index.
        StillInUseError: the old column is still read or written, and ``force`` was not given.
        TableBusyError: the table's lock could not be had.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        pair = pair_of(connection, column)
        if pair.old is None:
            return False
        _require_ready(connection, pair, max_failed)
        if not force:
            require_unused(connection, column, quiet=quiet, watch=watch)
    old, new = pair.old.binding, pair.new.binding

    def step(connection: sa.Connection) -> bool:
        lock(connection, old)
        if catalog.binding_of(connection, old.identity) is None:
            return False
        # Rows that came since the last look are pending in the new column; counting the table anew
        # would lock everybody out for as long.
        if catalog.binding_of(connection, new.identity) is None:
            raise ReembeddingError(f"{new} was removed meanwhile; nothing was dropped.")
        drop_bound_column(connection, old)
        activate(connection, new)
        return True

    return in_short_transactions(
        engine, step, relation=pair.relation, lock_timeout=lock_timeout, attempts=attempts
    )


def _require_ready(connection: sa.Connection, pair: Pair, max_failed: int) -> None:
    facts = facts_of(connection, pair)
    reasons = unready(facts, max_failed=max_failed)
    if reasons:
        raise BackfillIncompleteError(
            f"{facts.table}.{facts.new} cannot take the place of {facts.old} yet: "
            f"{joined(reasons)}. Next: {next_step(facts)}."
        )


def abort(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> bool:
    """Give a change up: remove the new column, its indexes, binding, triggers and marks.

    One transaction; afterwards nothing is left of the change. The old column was fresh throughout.

    Args:
        engine: where.
        column: the new column.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        Whether there was anything to remove.

    Raises:
        ReembeddingError: the column replaces nothing, so it is not a change's new column.
        TableBusyError: the table's lock could not be had; an index that is being built holds it.
    """
    with engine.connect() as connection:
        binding = catalog.binding_of(connection, column)
        if binding is None:
            return False
        if binding.replaces is None:
            newer = replacement_of(connection, binding)
            hint = f"; its replacement is {newer.column!r}" if newer is not None else ""
            raise ReembeddingError(
                f"{binding} replaces no column, so there is no change to give up{hint}. Give the "
                "new column of a change that is under way."
            )
        connection.rollback()

    def step(connection: sa.Connection) -> bool:
        lock(connection, binding)
        if catalog.binding_of(connection, binding.identity) is None:
            return False
        drop_bound_column(connection, binding)
        return True

    return in_short_transactions(
        engine,
        step,
        relation=system.name_of(engine.dialect, binding.schema, binding.table),
        lock_timeout=lock_timeout,
        attempts=attempts,
    )


def drop_bound_column(connection: sa.Connection, binding: Binding) -> None:
    """Unbind a column and drop it, with its indexes, and its encoder if nobody else has it."""
    encoder_id = connection.execute(
        sa.select(tables.embedding_column.c.encoder_id).where(
            tables.embedding_column.c.id == binding.id
        )
    ).scalar_one()
    catalog.unbind(connection, binding.identity)
    operations_on(connection).drop_column(binding.table, binding.column, schema=binding.schema)
    if encoder_id is None:
        return
    used = sa.exists().where(tables.embedding_column.c.encoder_id == encoder_id)
    connection.execute(
        sa.delete(tables.encoder).where(tables.encoder.c.id == encoder_id, sa.not_(used))
    )


def activate(connection: sa.Connection, binding: Binding) -> None:
    """Say in the catalog that a column's rows are complete."""
    connection.execute(
        sa.update(tables.embedding_column)
        .where(tables.embedding_column.c.id == binding.id)
        .values(state="active")
    )


def lock(connection: sa.Connection, binding: Binding) -> None:
    """Lock a bound column's table against everybody until the transaction ends."""
    table = sa.Table(binding.table, sa.MetaData(), schema=binding.schema)
    connection.execute(LockTable(table, "ACCESS EXCLUSIVE"))
