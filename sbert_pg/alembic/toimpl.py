"""How the operations on the schema ``sbert`` and on embedding columns are carried out."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from sbert_pg import catalog, reembedding
from sbert_pg.alembic import ops, statements
from sbert_pg.alembic.filling import fill_column
from sbert_pg.alembic.online import online, require_left, within, write
from sbert_pg.catalog import system
from sbert_pg.errors import (
    BackfillIncompleteError,
    EncoderMismatchError,
    NotProvenError,
)
from sbert_pg.reembedding.coverage import coverage_of
from sbert_pg.reembedding.pair import pair_of
from sbert_pg.reembedding.rebind import rebind
from sbert_pg.registry import get_encoder
from sbert_pg.types import guard
from sbert_pg.types.guard import ColumnIdentity

log = logging.getLogger("sbert_pg.alembic")


def upgrade_schema(operations: Operations, operation: ops.UpgradeSchemaOp) -> None:
    """Create the schema, or bring it up."""
    if operations.migration_context.as_sql:
        write(operations, sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        _write(operations, catalog.upgrade_sql(operation.revision, start=operation.previous))
        return
    connection = operations.get_bind()
    current = catalog.current(connection)
    if current is not None and operation.revision in reached(current):
        return
    name = system.EXTENSION.c.extname
    there = sa.select(name).where(name == "vector")
    if connection.execute(there).first() is None:
        connection.execute(sa.text("CREATE EXTENSION vector"))
    catalog.upgrade(connection, operation.revision)


def reached(current: str) -> set[str]:
    """Revisions of the catalog that a database at ``current`` has been through."""
    script = ScriptDirectory(str(catalog.script_location()))
    try:
        return {step.revision for step in script.iterate_revisions(current, "base")}
    except CommandError:
        return set()


def downgrade_schema(operations: Operations, operation: ops.DowngradeSchemaOp) -> None:
    """Take the schema back."""
    if operations.migration_context.as_sql:
        if operation.revision == "base":
            write(operations, _DROP_SCHEMA_IF_UNUSED)
        else:
            _write(operations, f"-- the schema sbert stays where it is; it is at {catalog.head()}")
        return
    connection = operations.get_bind()
    bound = catalog.all_bindings(connection)
    if operation.revision == "base" and bound:
        log.warning(
            "The schema sbert is left in place: %s columns are bound, %s among them.",
            len(bound),
            bound[0],
        )
        return
    catalog.downgrade(connection, operation.revision)


_DROP_SCHEMA_IF_UNUSED = sa.text(
    "DO $sbert$ BEGIN "
    "IF NOT EXISTS (SELECT FROM sbert.embedding_column) THEN "
    "DROP SCHEMA sbert CASCADE; END IF; END $sbert$"
)


def _write(operations: Operations, script: str) -> None:
    """Write statements that are text already."""
    operations.migration_context.impl.static_output(script.strip())


def identity_of(operation: ops.ColumnOperation) -> ColumnIdentity:
    """The column of an operation."""
    return ColumnIdentity(operation.schema, operation.table_name, operation.column_name)


def _relation(operation: ops.ColumnOperation) -> str:
    return statements.relation(operation.table_name, operation.schema)


def add_embedding_column(operations: Operations, operation: ops.AddEmbeddingColumnOp) -> None:
    """Column, binding and triggers, marks: each in a transaction of its own.

    Marks need no lock on the table: a row that was written before the triggers were there has been
    committed when they are, and every later one is noticed.
    """
    identity, declaration = identity_of(operation), operation.declaration
    with online(operations, _relation(operation)) as runner:
        runner.execute(statements.AddColumn(identity, declaration.type_()))
        runner.execute(statements.bind(identity, declaration))
        if operation.mark_pending:
            runner.execute(statements.mark_pending(identity))
    _forget(operations)


def drop_embedding_column(operations: Operations, operation: ops.DropEmbeddingColumnOp) -> None:
    """Triggers and binding, then the column."""
    identity = identity_of(operation)
    with online(operations, _relation(operation)) as runner:
        runner.execute(statements.unbind(identity))
        runner.execute(statements.DropColumn(identity))
    _forget(operations)


def finish_replacement(operations: Operations, operation: ops.FinishReplacementOp) -> None:
    """Contract, by the rules of re-embedding."""
    if operations.migration_context.as_sql:
        _write(
            operations,
            "-- Before this, 'sbert-pg reembed status' has to say that the new column is complete "
            "and the old one unused.",
        )
        drop_embedding_column(operations, operation)
        return
    identity = identity_of(operation)
    with online(operations, _relation(operation)) as runner:
        require_left(runner, "finish_replacement")
        if catalog.binding_of(runner.connection, identity) is None:
            # A first attempt has unbound it.
            runner.execute(statements.DropColumn(identity))
            return
        _require_no_row_missing(runner.connection, identity)
        reembedding.finish(
            runner.connection.engine,
            identity,
            force=operation.force,
            quiet=dt.timedelta(seconds=operation.quiet),
        )
    _forget(operations)


def resume_replacement(operations: Operations, operation: ops.ResumeReplacementOp) -> None:
    """Have the catalog say which column is replaced; its own trigger watches the writers then."""
    with online(operations, _relation(operation)) as runner:
        runner.execute(statements.Resume(identity_of(operation), operation.replaces))
    _forget(operations)


def _require_no_row_missing(connection: sa.Connection, old: ColumnIdentity) -> None:
    """Also rows that became pending a moment ago: a migration can be run again."""
    pair = pair_of(connection, old)
    found = coverage_of(connection, pair.new.binding)
    if found.missing > found.failed:
        raise BackfillIncompleteError(
            f"{found.missing:,} of {found.with_text:,} rows of {pair.new.binding} have no vector "
            f"yet, so {old.column!r} is not dropped. Run 'sbert-pg backfill {pair.new.binding}', "
            "then this migration again."
        )


def bind_embedding_column(operations: Operations, operation: ops.BindEmbeddingColumnOp) -> None:
    """Bind, in the migration's transaction or in a short one of its own."""
    identity = identity_of(operation)
    if not operations.migration_context.as_sql and not operation.trust_vectors:
        _refuse_foreign_vectors(operations.get_bind(), identity)
    _run(operations, operation, statements.bind(identity, operation.declaration))
    if operation.mark_pending:
        _run(operations, operation, statements.mark_pending(identity))
    _forget(operations)


def _run(
    operations: Operations,
    operation: ops.BindEmbeddingColumnOp | ops.UnbindEmbeddingColumnOp,
    statement: Any,
) -> None:
    around = online if operation.concurrently else within
    with around(operations, _relation(operation)) as runner:
        runner.execute(statement)


def _refuse_foreign_vectors(connection: sa.Connection, identity: ColumnIdentity) -> None:
    if catalog.binding_of(connection, identity) is not None:
        return
    column: sa.ColumnClause[Any] = sa.column(identity.column)
    table = sa.table(identity.table, column, schema=identity.schema)
    filled = sa.select(sa.literal(1)).select_from(table).where(column.is_not(None)).limit(1)
    if connection.execute(filled).first() is not None:
        raise NotProvenError(
            f"{identity} holds vectors, and nothing shows which encoder and source made them. "
            "'sbert-pg adopt' proves it on a sample and binds the column; or say "
            "trust_vectors=True in the migration if you are certain."
        )


def unbind_embedding_column(operations: Operations, operation: ops.UnbindEmbeddingColumnOp) -> None:
    """Unbind, in the migration's transaction or in a short one of its own."""
    _run(operations, operation, statements.unbind(identity_of(operation)))
    _forget(operations)


def follow_rename(operations: Operations, operation: ops.FollowRenameOp) -> None:
    """Rewrite the bindings that name the column."""
    with within(operations, _relation(operation)) as runner:
        runner.execute(statements.follow_rename(identity_of(operation), operation.new_name))
    _forget(operations)


def rebind_embedding_column(operations: Operations, operation: ops.RebindEmbeddingColumnOp) -> None:
    """Prove that another encoder shares the space, and write the agreement down."""
    if operations.migration_context.as_sql:
        raise CommandError(
            "rebind_embedding_column compares an encoder with the database and cannot be written "
            "as a script; run this migration against the database."
        )
    identity = identity_of(operation)
    with online(operations, _relation(operation)) as runner:
        require_left(runner, "rebind_embedding_column")
        binding = catalog.require_binding(runner.connection, identity)
        if binding.fingerprint is None:
            raise EncoderMismatchError(
                f"{binding} has not met its encoder {binding.declared.name!r} yet, so nothing can "
                "be compared with it. Start a worker once, or write a row through sbert-pg, with "
                "that encoder; then run this migration again."
            )
        encoder = get_encoder(operation.encoder)
        log.info("%s", rebind(runner.connection.engine, identity, encoder))
    _forget(operations)


def require_backfill(operations: Operations, operation: ops.RequireBackfillOp) -> None:
    """Count the rows without a vector, and fail where they are too many."""
    identity = identity_of(operation)
    with online(operations, _relation(operation)) as runner:
        if runner.as_sql:
            runner.execute(statements.RequireRows(identity, None, operation.max_missing))
            return
        binding = catalog.require_binding(runner.connection, identity)
        found = coverage_of(runner.connection, binding)
        if found.missing <= operation.max_missing:
            return
        allowed = f", and {operation.max_missing:,} are allowed" if operation.max_missing else ""
        failed = f" {found.failed:,} rows have failed: see 'sbert-pg retry' and 'sbert-pg skip'."
        raise BackfillIncompleteError(
            f"{found.missing:,} of {found.with_text:,} rows of {binding} have no vector yet"
            f"{allowed}. The column is there and is kept fresh. Run 'sbert-pg backfill {binding}' "
            "(or let workers finish), then run the same 'alembic upgrade' again."
            + (failed if found.failed else "")
        )


def backfill_embeddings(operations: Operations, operation: ops.BackfillEmbeddingsOp) -> None:
    """Fill the column in place."""
    if operations.migration_context.as_sql:
        _write(
            operations,
            f"-- Run: sbert-pg backfill {identity_of(operation)}",
        )
        return
    with online(operations, _relation(operation)) as runner:
        require_left(runner, "backfill_embeddings")
        binding = catalog.require_binding(runner.connection, identity_of(operation))
        fill_column(runner.connection.engine, binding)


def _forget(operations: Operations) -> None:
    """Have this process look at the bindings anew."""
    if not operations.migration_context.as_sql:
        guard.forget(operations.get_bind().dialect)


#: Operation and how it is carried out.
IMPLEMENTATIONS: tuple[tuple[type[ops.SbertOperation], Callable[..., Any]], ...] = (
    (ops.NothingOp, lambda operations, operation: None),
    (ops.UpgradeSchemaOp, upgrade_schema),
    (ops.DowngradeSchemaOp, downgrade_schema),
    (ops.AddEmbeddingColumnOp, add_embedding_column),
    (ops.BeginReplacementOp, add_embedding_column),
    (ops.DropEmbeddingColumnOp, drop_embedding_column),
    (ops.FinishReplacementOp, finish_replacement),
    (ops.ResumeReplacementOp, resume_replacement),
    (ops.BindEmbeddingColumnOp, bind_embedding_column),
    (ops.UnbindEmbeddingColumnOp, unbind_embedding_column),
    (ops.RebindEmbeddingColumnOp, rebind_embedding_column),
    (ops.FollowRenameOp, follow_rename),
    (ops.RequireBackfillOp, require_backfill),
    (ops.BackfillEmbeddingsOp, backfill_embeddings),
)
