"""How vector indexes are built, replaced and dropped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations

from sbert_pg.alembic import ops, statements
from sbert_pg.alembic.declaration import IndexDefinition
from sbert_pg.alembic.online import (
    Online,
    is_enclosed,
    online,
    require_left,
    settings,
    within,
)
from sbert_pg.alembic.reading import indexes_of, same
from sbert_pg.catalog import system
from sbert_pg.errors import TableBusyError

log = logging.getLogger("sbert_pg.alembic")

#: Attempts to build or drop an index concurrently, each of which waits as long as it may.
INDEX_ATTEMPTS = 3
#: Rows up to which an index is built in a transaction that the application itself began.
SMALL_TABLE = 10_000


def create_vector_index(operations: Operations, operation: ops.CreateVectorIndexOp) -> None:
    """Build an index, unless the one that is wanted is there."""
    definition = operation.definition
    relation = statements.relation(definition.table, definition.schema)
    if not operation.concurrently or _small_and_enclosed(operations, relation):
        _create_plainly(operations, operation)
        return
    with online(operations, relation, lock_timeout=operation.lock_timeout) as runner:
        require_left(runner, f"Building index {definition.name!r} concurrently")
        memory = operation.maintenance_work_mem
        with settings(runner, {} if memory is None else {"maintenance_work_mem": memory}):
            if runner.as_sql:
                _write(runner, operation)
            else:
                _build(runner, operation)


def drop_vector_index(operations: Operations, operation: ops.DropVectorIndexOp) -> None:
    """Drop an index, if it is there."""
    definition = operation.definition
    relation = statements.relation(definition.table, definition.schema)
    if not operation.concurrently or is_enclosed(operations):
        with within(operations, relation) as runner:
            runner.execute(
                statements.DropIndex(definition.name, definition.schema, concurrently=False)
            )
        return
    with online(operations, relation, lock_timeout=operation.lock_timeout) as runner:
        _drop(runner, definition, definition.name)
        if not runner.as_sql:
            _drop(runner, definition, _beside(definition.name))


def _create_plainly(operations: Operations, operation: ops.CreateVectorIndexOp) -> None:
    definition = operation.definition
    drop = statements.DropIndex(definition.name, definition.schema, concurrently=False)
    with within(operations, statements.relation(definition.table, definition.schema)) as runner:
        if operation.replace_existing:
            runner.execute(drop)
        runner.execute(statements.CreateIndex(definition, concurrently=False, if_not_exists=True))


def _small_and_enclosed(operations: Operations, relation: str) -> bool:
    """Whether the table is small and nothing can happen outside of the transaction anyway."""
    if not is_enclosed(operations):
        return False
    rows = sa.select(sa.literal(1)).select_from(sa.text(relation)).offset(SMALL_TABLE).limit(1)
    return operations.get_bind().execute(rows).first() is None


def _write(runner: Online, operation: ops.CreateVectorIndexOp) -> None:
    definition = operation.definition
    if operation.replace_existing:
        _drop(runner, definition, definition.name)
    runner.execute(statements.CreateIndex(definition, concurrently=True, if_not_exists=True))
    runner.execute(statements.RequireValidIndex(definition.name, definition.schema))


def _build(runner: Online, operation: ops.CreateVectorIndexOp) -> None:
    """Build, or build beside what is there, drop that and rename; from wherever it was left."""
    definition, connection = operation.definition, runner.connection
    beside = _beside(definition.name)
    _wait_for_other(runner, [definition.name, beside], operation.lock_timeout)
    there = indexes_of(connection, definition.table, definition.schema)
    old = there.get(definition.name)
    if (
        old is not None
        and old[1]
        and (not operation.replace_existing or same(connection, definition, old[0]))
    ):
        _drop_if_there(runner, definition, beside)
        return
    if old is not None and not old[1]:
        _drop(runner, definition, definition.name)
        old = None
    new = there.get(beside)
    if new is not None and not (new[1] and same(connection, definition, new[0])):
        _drop(runner, definition, beside)
        new = None
    if new is None and old is None:
        _create(runner, definition, definition.name)
        return
    if new is None:
        _create(runner, definition, beside)
    if old is not None:
        _drop(runner, definition, definition.name)
    runner.execute(statements.RenameIndex(beside, definition.schema, definition.name))


def _create(runner: Online, definition: IndexDefinition, name: str) -> None:
    """Build concurrently; a failure leaves no invalid index where that can be helped."""
    statement = statements.CreateIndex(
        definition, concurrently=True, if_not_exists=False, name=name
    )
    for attempt in range(1, INDEX_ATTEMPTS + 1):
        try:
            runner.execute(statement, attempts=1)
            return
        except TableBusyError:
            _drop_if_there(runner, definition, name)
            if attempt == INDEX_ATTEMPTS:
                raise
        except sa.exc.DBAPIError:
            if not runner.connection.invalidated:
                _drop_if_there(runner, definition, name)
            raise


def _drop(runner: Online, definition: IndexDefinition, name: str) -> None:
    runner.execute(
        statements.DropIndex(name, definition.schema, concurrently=True), attempts=INDEX_ATTEMPTS
    )


def _drop_if_there(runner: Online, definition: IndexDefinition, name: str) -> None:
    if name in indexes_of(runner.connection, definition.table, definition.schema):
        _drop(runner, definition, name)


def _wait_for_other(runner: Online, names: list[str], seconds: float) -> None:
    """Wait while another session builds an index, such as one whose client was killed.

    Raises:
        TableBusyError: it is still building after that time.
    """
    progress, klass = system.INDEX_PROGRESS, system.CLASS
    building = (
        sa.select(progress.c.pid, klass.c.relname)
        .join_from(progress, klass, klass.c.oid == progress.c.index_relid)
        .where(
            klass.c.relname.in_(names),
            progress.c.relid == sa.cast(sa.func.to_regclass(runner.relation), sa.BigInteger),
        )
    )
    ends = time.monotonic() + seconds
    told = False
    while (found := runner.connection.execute(building).first()) is not None:
        if not told:
            log.warning("Process %s is building index %r; waiting for it.", *found)
            told = True
        if time.monotonic() > ends:
            raise TableBusyError(
                f"Process {found[0]} is building index {found[1]!r} now. Wait for it, or end it "
                "with pg_terminate_backend, and run the same migration again."
            )
        time.sleep(0.5)


def _beside(name: str) -> str:
    """Name under which a replacement is built; within PostgreSQL's 63 bytes."""
    return name.encode()[:59].decode(errors="ignore") + "_new"


#: Operation and how it is carried out.
INDEX_IMPLEMENTATIONS: tuple[tuple[type[ops.SbertOperation], Callable[..., Any]], ...] = (
    (ops.CreateVectorIndexOp, create_vector_index),
    (ops.DropVectorIndexOp, drop_vector_index),
)
