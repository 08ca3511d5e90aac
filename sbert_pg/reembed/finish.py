"""Finish and abort: one of a change's two columns goes, and the other stays as if alone."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from sbert_pg import catalog, system
from sbert_pg.catalog import Binding
from sbert_pg.errors import BackfillIncompleteError, ReembeddingError, StillInUseError
from sbert_pg.reembed.status import (
    QUIET,
    operations_on,
    replacement_of,
    sides_of,
    status_of,
    use_of,
)
from sbert_pg.system import ATTEMPTS, LOCK_TIMEOUT, ColumnIdentity, in_short_transactions


def finish(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    force: bool = False,
    quiet: dt.timedelta = QUIET,
    watch: float = 0.0,
    max_pending: int | None = 0,
    max_failed: int | None = 0,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> bool:
    """Finish a change: unbind and drop the old column with its indexes, in one transaction.

    Everything is checked before anything is changed. ``DROP COLUMN`` takes ``ACCESS EXCLUSIVE`` for
    an instant, rewrites nothing and waits for the lock no longer than ``lock_timeout`` at a time.

    Args:
        column: the new column, or the old one.
        force: drop it although it is still in use. Completeness is required all the same.
        quiet: how long the old column must not have been used.
        watch: seconds to watch it first.
        max_pending: new and changed rows that may wait for their vector; any number for ``None``.
        max_failed: rows allowed whose text could not be encoded; any number for ``None``.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        Whether it was dropped now; ``False`` where the change was finished before.

    Raises:
        BackfillIncompleteError: the new column is not complete, or lacks its index.
        ReembeddingError: a view or another object of the server's depends on the old column.
        StillInUseError: the old column is still read or written, and ``force`` was not given. What
            cannot be seen is listed in ``status(...).unseen``.
        TableBusyError: the table's lock could not be had.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        new, replaced = sides_of(connection, column)
        if replaced is None:
            return False
        old = replaced
        require_finishable(connection, new, old, force, quiet, watch, max_pending, max_failed)

    def step(connection: sa.Connection) -> bool:
        _lock(connection, old)
        if catalog.binding_by_id(connection, old.id) is None:
            return False
        # Rows that came since the last look are pending in the new column. That it is still there,
        # and still the same binding, is what has to be asked under the lock.
        if catalog.binding_by_id(connection, new.id) is None:
            raise ReembeddingError(f"{new} was removed meanwhile; nothing was dropped.")
        drop_bound_column(connection, old)
        activated = sa.func.sbert.set_state_v1(new.id, "filling", "active")
        connection.execute(sa.select(activated))
        return True

    relation = system.name_of(old.schema, old.table)
    return in_short_transactions(
        engine, step, relation=relation, lock_timeout=lock_timeout, attempts=attempts
    )


def require_finishable(
    connection: sa.Connection,
    new: Binding,
    old: Binding,
    force: bool = False,
    quiet: dt.timedelta = QUIET,
    watch: float = 0.0,
    max_pending: int | None = 0,
    max_failed: int | None = 0,
) -> None:
    """Do nothing where a change can be finished now; its arguments and errors are ``finish``'s."""
    stands = status_of(connection, new, old, whole=False)
    reasons = stands.reasons(max_pending, max_failed)
    if reasons:
        raise BackfillIncompleteError(
            f"{new} cannot take the place of {old.column} yet: {'; '.join(reasons)}. Next: "
            f"{stands.next_step}."
        )
    require_droppable(connection, old)
    in_use = () if force else use_of(connection, old, quiet, watch)
    if in_use:
        raise StillInUseError(
            f"{old} is still in use: {'; '.join(in_use)}. Wait until every process runs the code "
            f"that declares {new.column!r}, and for {quiet.total_seconds():.0f} s more; or force "
            "it, and whoever still uses it will fail."
        )


#: What ``DROP COLUMN`` refuses, of the table, its partitions and those that inherit from it, but
#: for this library's own triggers; what goes with the column, as a CHECK does, is not in the way.
_DEPENDENT = sa.text(
    "WITH RECURSIVE family (oid) AS (SELECT CAST(:relation AS oid) UNION "
    "SELECT i.inhrelid FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid) "
    "SELECT DISTINCT pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid) "
    "FROM family f JOIN pg_catalog.pg_depend d ON d.refobjid = f.oid "
    "JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid "
    "LEFT JOIN pg_catalog.pg_trigger t "
    "ON d.classid = CAST('pg_catalog.pg_trigger' AS regclass) AND t.oid = d.objid "
    "LEFT JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid "
    "WHERE d.refclassid = CAST('pg_catalog.pg_class' AS regclass) AND d.deptype = 'n' "
    "AND a.attname IN (:column, :companion) "
    "AND p.pronamespace IS DISTINCT FROM CAST(pg_catalog.to_regnamespace('sbert') AS oid) "
    "AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend o WHERE o.deptype IN ('a', 'i') "
    "AND (o.classid, o.objid, o.objsubid) = (d.classid, d.objid, d.objsubid) "
    "AND (o.refclassid, o.refobjid, o.refobjsubid) = (d.refclassid, d.refobjid, d.refobjsubid)) "
    "ORDER BY 1"
)


def require_droppable(connection: sa.Connection, binding: Binding) -> None:
    """Refuse to drop a column that a view, trigger or other object of the application's needs."""
    if {binding.column, binding.companion} & set(catalog.missing_columns(connection, binding)):
        catalog.require_columns(connection, binding)
    dependents = connection.scalars(
        _DEPENDENT,
        {"relation": binding.relation, "column": binding.column, "companion": binding.companion},
    ).all()
    if dependents:
        raise ReembeddingError(
            f"{binding} cannot be dropped, since the server keeps for it: {'; '.join(dependents)}. "
            "Change or drop these first, then run the same again. Nothing was changed."
        )


def abort(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> bool:
    """Give a change up: remove the new column with its binding, indexes and triggers.

    One transaction; afterwards nothing is left of the change. The old column was fresh throughout.

    Args:
        column: the new column.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        Whether there was anything to remove.

    Raises:
        ReembeddingError: the column replaces nothing, so it is not a change's new column; or a view
            or another object of the server's depends on it.
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
        require_droppable(connection, binding)

    def step(connection: sa.Connection) -> bool:
        _lock(connection, binding)
        if catalog.binding_by_id(connection, binding.id) is None:
            return False
        drop_bound_column(connection, binding)
        return True

    relation = system.name_of(binding.schema, binding.table)
    return in_short_transactions(
        engine, step, relation=relation, lock_timeout=lock_timeout, attempts=attempts
    )


def drop_bound_column(connection: sa.Connection, binding: Binding) -> None:
    """Unbind a column and drop it and its companion."""
    catalog.unbind(connection, binding.identity)
    operations = operations_on(connection)
    for name in (binding.column, binding.companion):
        operations.drop_column(binding.table, name, schema=binding.schema)


def _lock(connection: sa.Connection, binding: Binding) -> None:
    """Lock a bound column's table against everybody until the transaction ends."""
    table = sa.Table(binding.table, sa.MetaData(), schema=binding.schema)
    connection.execute(system.ddl("LOCK TABLE %(fullname)s IN ACCESS EXCLUSIVE MODE", table))
