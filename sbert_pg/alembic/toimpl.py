"""How the operations are carried out, and written for ``--sql``.

What is refused is refused before the migration's transaction is committed: then all that the
migration did is taken back, and it can be run again as a whole. Other databases, such as SQLite,
where models are tested, get and lose the columns alone. Long, since it has a part for each.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError

from sbert_pg import catalog, reembed, system
from sbert_pg.alembic import ops, statements
from sbert_pg.alembic.statements import (
    Online,
    alter_column,
    call,
    online,
    require_left,
    within,
    write,
    write_text,
)
from sbert_pg.catalog import Binding, guard
from sbert_pg.catalog.embedding import Embedding, companion_column
from sbert_pg.errors import (
    BackfillIncompleteError,
    EncoderMismatchError,
    NotProvenError,
    SbertPgError,
)
from sbert_pg.freshness import Progress, backfill, counts
from sbert_pg.freshness.queue import COUNTED
from sbert_pg.indexes.partitioned import is_partitioned
from sbert_pg.progress import bar
from sbert_pg.reembed.change import begun_change, holds_vectors
from sbert_pg.reembed.finish import require_droppable, require_finishable
from sbert_pg.reembed.status import change_of
from sbert_pg.registry import get_encoder
from sbert_pg.source import companion_name
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity, settings
from sbert_pg.types.vector import plain_type

log = logging.getLogger("sbert_pg.alembic")


def implement(operations: Operations, operation: ops.SbertOperation) -> None:
    """Carry an operation out for Alembic, which hands it on like this."""
    with refusing():
        if operations.migration_context.dialect.name == "postgresql":
            carry_out(operation, operations)
            if not operations.migration_context.as_sql:
                # This process looks at the bindings afresh.
                guard.forget(operations.get_bind().dialect)
        else:
            carry_out_elsewhere(operation, operations)


@contextmanager
def refusing() -> Iterator[None]:
    """Make errors of this library Alembic's ``CommandError`` as well.

    Alembic's command line, and Flask-Migrate's, print the message of such an error and exit; any
    other one ends in a traceback of the migration's innards.
    """
    try:
        yield
    except CommandError:
        raise
    except SbertPgError as error:
        raise _as_command_error(error).with_traceback(error.__traceback__) from error.__cause__


def _as_command_error(error: SbertPgError) -> SbertPgError:
    kind = type(error)
    both = type(kind.__name__, (kind, CommandError), {"__module__": kind.__module__})
    twin: SbertPgError = both.__new__(both, *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


@functools.singledispatch
def carry_out(operation: ops.SbertOperation, operations: Operations) -> None:
    """Carry an operation out, or write it into a script."""
    raise NotImplementedError(type(operation).__name__)


@carry_out.register
def _nothing(operation: ops.NothingOp, operations: Operations) -> None:
    """Nothing."""


@carry_out.register
def _upgrade_schema(operation: ops.UpgradeSchemaOp, operations: Operations) -> None:
    if operations.migration_context.as_sql:
        write(operations, sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        text = catalog.upgrade_sql(operation.revision, start=operation.previous, transaction=False)
        write_text(operations, text)
        return
    connection = operations.get_bind()
    current = catalog.current(connection)
    if current is not None and operation.revision in reached(current):
        return
    catalog.upgrade(connection, operation.revision)


def reached(current: str) -> set[str]:
    """Revisions of the catalog that a database at ``current`` has been through."""
    script = ScriptDirectory(str(catalog.script_location()))
    try:
        return {step.revision for step in script.iterate_revisions(current, "base")}
    except (CommandError, RevisionError):
        return set()


@carry_out.register
def _downgrade_schema(operation: ops.DowngradeSchemaOp, operations: Operations) -> None:
    if operations.migration_context.as_sql:
        if operation.revision == "base":
            write(operations, _DROP_SCHEMA_IF_UNUSED)
        else:
            text = f"-- the schema sbert stays where it is; it is at {catalog.head()}"
            write_text(operations, text)
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
    "IF NOT EXISTS (SELECT FROM sbert.binding) THEN "
    "DROP SCHEMA sbert CASCADE; END IF; END $sbert$"
)


@carry_out.register
def _add_embedding_column(operation: ops.AddEmbeddingColumnOp, operations: Operations) -> None:
    """Column, binding with its companion and triggers, queue: each in its own transaction."""
    identity, declared = operation.place, operation.declared
    type_ = plain_type(declared.storage, declared.dimensions)
    if declared.replaces is not None and not operations.migration_context.as_sql:
        connection = operations.get_bind()
        old = catalog.binding_of(connection, identity._replace(column=declared.replaces))
        if old is not None:
            begun_change(connection, old, identity.column)
    with online(operations, operation.relation) as runner:
        runner.execute(alter_column(identity, "add", type_=type_))
        _bind(runner, identity, declared)


def _bind(runner: Online, identity: ColumnIdentity, declared: Embedding) -> None:
    """Bind, and build the two indexes of the binding beside live traffic where that is possible."""
    # No index of a partitioned table can be built concurrently.
    relation = system.name_of(identity.schema, identity.table)
    plainly = runner.as_sql or runner.enclosed or is_partitioned(runner.connection, relation)
    runner.execute(statements.bind(identity, declared, build=plainly))
    if plainly:
        return
    connection = runner.connection
    binding = catalog.require_binding(connection, identity)
    catalog.build_queue(connection, binding, lock_timeout=runner.lock_timeout)


@carry_out.register
def _drop_embedding_column(operation: ops.DropEmbeddingColumnOp, operations: Operations) -> None:
    """Triggers, queue and binding, then the column and its companion."""
    binding = _binding_of(operation, operations)
    if binding is not None:
        require_droppable(operations.get_bind(), binding)
    with online(operations, operation.relation) as runner:
        _unbind(runner, operation, binding)
        runner.execute(alter_column(operation.place, "drop"))


def _binding_of(operation: ops.ColumnOperation, operations: Operations) -> Binding | None:
    """The binding of an operation's column, where the catalog can be asked."""
    if operations.migration_context.as_sql:
        return None
    return catalog.binding_of(operations.get_bind(), operation.place)


def _unbind(runner: Online, operation: ops.ColumnOperation, binding: Binding | None) -> None:
    """Unbind a column, and drop its companion."""
    name = companion_name(operation.column_name) if binding is None else binding.companion
    runner.execute(call("unbind_v1", operation.place))
    runner.execute(alter_column(operation.place._replace(column=name), "drop"))


@carry_out.register
def _finish_reembedding(operation: ops.FinishReembeddingOp, operations: Operations) -> None:
    if operations.migration_context.as_sql:
        text = (
            "-- Before this, 'sbert-pg reembed status' has to say that the new column is complete "
            "and the old one unused."
        )
        write_text(operations, text)
        _drop_embedding_column(operation, operations)
        return
    identity, connection = operation.place, operations.get_bind()
    require_left(operations, "finish_reembedding")
    if catalog.binding_of(connection, identity) is None:
        # A first attempt has unbound it.
        _drop_embedding_column(operation, operations)
        return
    quiet = dt.timedelta(seconds=operation.quiet)
    with settings(connection, {"statement_timeout": "0"}):
        new, old = change_of(connection, identity)
        require_finishable(connection, new, old, force=operation.force, quiet=quiet)
    with online(operations, operation.relation) as runner:
        reembed.finish(runner.connection.engine, new.identity, force=operation.force, quiet=quiet)


@carry_out.register
def _resume_reembedding(operation: ops.ResumeReembeddingOp, operations: Operations) -> None:
    """Have the catalog say which column is replaced."""
    with online(operations, operation.relation) as runner:
        runner.execute(call("resume_v1", operation.place, operation.replaces))


@carry_out.register
def _bind_embedding_column(operation: ops.BindEmbeddingColumnOp, operations: Operations) -> None:
    """Bind, in the migration's transaction or in a short one."""
    identity = operation.place
    if not operations.migration_context.as_sql and not operation.discard_vectors:
        _refuse_foreign_vectors(operations.get_bind(), identity)
    around = online if operation.concurrently else within
    with around(operations, operation.relation) as runner:
        _bind(runner, identity, operation.declared)


def _refuse_foreign_vectors(connection: sa.Connection, identity: ColumnIdentity) -> None:
    if catalog.binding_of(connection, identity) is not None:
        return
    if holds_vectors(connection, identity):
        raise NotProvenError(
            f"{identity} holds vectors, and nothing shows which encoder and source made them. "
            "'sbert-pg adopt' proves it on a sample and binds the column; or say "
            "discard_vectors=True in the migration to have each made again."
        )


@carry_out.register
def _unbind_embedding_column(
    operation: ops.UnbindEmbeddingColumnOp, operations: Operations
) -> None:
    """Unbind, in the migration's transaction or in its own short ones."""
    binding = _binding_of(operation, operations)
    around = online if operation.concurrently else within
    with around(operations, operation.relation) as runner:
        _unbind(runner, operation, binding)


@carry_out.register
def _rename_bound_column(operation: ops.RenameBoundColumnOp, operations: Operations) -> None:
    """Rename the column, and its companion where it has one; bindings follow."""
    names = [(operation.column_name, operation.new_name)]
    if not operations.migration_context.as_sql:
        binding = _binding_of(operation, operations)
        if binding is not None:
            names.append((binding.companion, companion_name(operation.new_name)))
        there = system.stored_types(operations.get_bind(), operation.relation)
        names = [(old, new) for old, new in names if old in there]
    with within(operations, operation.relation) as runner:
        for old, new in names:
            column = operation.place._replace(column=old)
            runner.execute(alter_column(column, "rename", new_name=new))
            runner.execute(call("rename_v1", column, new))


@carry_out.register
def _rebind_embedding_column(
    operation: ops.RebindEmbeddingColumnOp, operations: Operations
) -> None:
    """Prove that another encoder shares the space, and write the agreement down."""
    if operations.migration_context.as_sql:
        raise CommandError(
            "rebind_embedding_column compares an encoder with the database and cannot be written "
            "as a script; run this migration against the database."
        )
    require_left(operations, "rebind_embedding_column")
    identity = operation.place
    binding = catalog.require_binding(operations.get_bind(), identity)
    if binding.fingerprint is None:
        raise EncoderMismatchError(
            f"{binding} has not met its encoder {binding.declared.name!r} yet, so nothing can be "
            "compared with it. Start a worker once, or write a row through sbert-pg, with that "
            "encoder; then run this migration again."
        )
    encoder = get_encoder(EncoderSpec.of(operation.encoder))
    with online(operations, operation.relation) as runner:
        log.info("%s", reembed.rebind(runner.connection.engine, binding.identity, encoder))


@carry_out.register
def _require_backfill(operation: ops.RequireBackfillOp, operations: Operations) -> None:
    """Count the rows without a vector, and fail where they are too many."""
    identity = operation.place
    if operations.migration_context.as_sql:
        with online(operations, operation.relation) as runner:
            runner.execute(call("require_filled_v1", identity, operation.max_missing))
        return
    connection = operations.get_bind()
    with settings(connection, {"statement_timeout": "0"}):
        binding = catalog.require_binding(connection, identity)
        counted = counts(connection, binding, operation.max_missing + COUNTED)
    missing = counted.pending + counted.backfill
    if missing <= operation.max_missing:
        return
    number = f"{'more than ' if counted.capped else ''}{missing:,}"
    allowed = f", and {operation.max_missing:,} are allowed" if operation.max_missing else ""
    failed = f" {counted.failed:,} rows have failed: see 'sbert-pg failed'."
    raise BackfillIncompleteError(
        f"{number} rows of {binding} have no vector yet{allowed}. The column is there and is kept "
        f"fresh. Run 'sbert-pg backfill {binding}' (or let workers finish), then run the same "
        "'alembic upgrade' again." + (failed if counted.failed else "")
    )


@carry_out.register
def _backfill_embeddings(operation: ops.BackfillEmbeddingsOp, operations: Operations) -> None:
    if operations.migration_context.as_sql:
        write_text(operations, f"-- Run: sbert-pg backfill {operation.place}")
        return
    require_left(operations, "backfill_embeddings")
    with online(operations, operation.relation) as runner:
        binding = catalog.require_binding(runner.connection, operation.place)
        _fill_column(runner.connection.engine, binding)


def _fill_column(engine: sa.Engine, binding: Binding) -> None:
    """Fill a column, together with whoever else is doing it, with a progress bar on a terminal."""
    with bar() as advance:

        def show(progress: Progress) -> None:
            advance(f"embedding {binding}", progress.rows, progress.total)

        filled = backfill(engine, binding, on_progress=show)
    log.info("%s rows of %s embedded in %.0f s", filled.rows, binding, filled.seconds)
    if not filled.complete:
        raise BackfillIncompleteError(
            f"The backfill of {binding} is not complete: some rows could not be written and are "
            "pending or failed. See 'sbert-pg status', then run the same migration again."
        )


def carry_out_elsewhere(operation: ops.SbertOperation, operations: Operations) -> None:
    """Carry an operation out as far as it is about columns, and pass over the rest."""
    dialect = operations.migration_context.dialect.name
    log.warning("op.%s: on %s columns come and go, and no more.", operation.name, dialect)
    if not isinstance(operation, ops.ColumnOperation):
        return
    table, schema = operation.table_name, operation.schema
    for name, change in _columns_elsewhere(operation).items():
        if isinstance(change, sa.Column):
            if not _is_there(name, operation, operations):
                operations.add_column(table, change, schema=schema)
        elif _is_there(name, operation, operations):
            if change is None:
                operations.drop_column(table, name, schema=schema)
            else:
                operations.alter_column(table, name, new_column_name=change, schema=schema)


def _is_there(name: str, operation: ops.ColumnOperation, operations: Operations) -> bool:
    if operations.migration_context.as_sql:
        # A script cannot look: a table that it creates has the columns that it binds.
        return not isinstance(operation, ops.AddEmbeddingColumnOp)
    inspector = sa.inspect(operations.get_bind())
    columns = inspector.get_columns(operation.table_name, schema=operation.schema)
    return name in {column["name"] for column in columns}


def _columns_elsewhere(operation: ops.ColumnOperation) -> dict[str, Any]:
    """By name a column that a table gets, ``None`` for one that it loses, or another's new name."""
    name = operation.column_name
    companion = companion_name(name)
    if isinstance(operation, ops.DeclaringOperation):
        columns: dict[str, Any] = {companion: companion_column(name)}
        if isinstance(operation, ops.AddEmbeddingColumnOp):
            declared = operation.declared
            columns[name] = sa.Column(name, plain_type(declared.storage, declared.dimensions))
        return columns
    if isinstance(operation, ops.DropEmbeddingColumnOp):
        return dict.fromkeys((companion, name))
    if isinstance(operation, ops.UnbindEmbeddingColumnOp):
        return {companion: None}
    if isinstance(operation, ops.RenameBoundColumnOp):
        return {name: operation.new_name, companion: companion_name(operation.new_name)}
    return {}
