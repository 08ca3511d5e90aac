"""Bind columns: say which encoder and source one has, and build what its binding needs.

A binding starts *declared*: a migration has said the encoder's name. The first process that uses
the column with a loaded encoder *seals* it: fingerprint, spec and probe vectors are written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog.migrate import upgrade
from sbert_pg.catalog.record import Binding, binding_by_id, binding_of, called, qualified
from sbert_pg.errors import BindingError, DeclarationError, NotBoundError
from sbert_pg.indexes import index_builder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ColumnIdentity, identity_of, require_connection

#: Seconds to wait while another session builds an index of a queue.
QUEUE_WAIT = 600.0


class QueueIndex(NamedTuple):
    """One of the two indexes of a binding.

    Attributes:
        kind: ``"queue"``, of what is pending, or ``"failed"``.
        name: a name for it, where it has to be created.
        definition: what stands behind ``CREATE INDEX [CONCURRENTLY] name``.
        existing: the index that is there now, as SQL spells its name, or ``None``.
        valid: whether that one is valid.
    """

    kind: str
    name: str
    definition: str
    existing: str | None
    valid: bool


def bind(
    connection: Connection,
    column: ColumnIdentity | sa.Column[Any],
    encoder: EncoderSpec | None = None,
    source: Source | None = None,
    *,
    replaces: str | None = None,
    build: bool = True,
) -> Binding:
    """Bind a vector column: catalog row, companion column, queue, triggers.

    The same again mends what is missing and follows columns that were only renamed. Locks writers
    out of the table until the transaction ends.

    Args:
        connection: a connection; its role owns the table.
        column: an embedding column of a table, or the identity of any vector column.
        encoder: the encoder as declared; an embedding column brings its own.
        source: what the text is made of; an embedding column brings its own.
        replaces: name of the bound column of the same table that this one is to replace; an
            embedding column brings its own, which counts where that column is still there.
        build: create the two indexes here. Without it they are the caller's, who creates them
            concurrently; see ``queue_indexes``.

    Raises:
        AlreadyBoundError: it is bound to another encoder or source, or the column to be replaced
            takes part in a change that is under way.
        NotBoundError: the column to be replaced is not bound.
        BindingError: it cannot be bound, or nothing says to what; the message says why.
    """
    require_connection("bind", connection)
    type_ = getattr(column, "type", None)
    encoder = encoder or getattr(type_, "encoder", None)
    source = source or getattr(type_, "source", None)
    identity = identity_of(column)
    replaces = replaces or _replaced(connection, column, identity)
    if encoder is None or source is None:
        raise BindingError(
            f"{identity} is not an embedding column, so bind() has to be given its encoder and "
            "source."
        )
    function = sa.func.sbert.bind_v1(
        sa.cast(qualified(connection, identity), pg.REGCLASS),
        identity.column,
        sa.cast(encoder.to_json(), pg.JSONB),
        sa.cast(source.to_json(), pg.JSONB),
        sa.cast(replaces, sa.Text),
        not build,
        type_=sa.Uuid(),
    )
    binding = binding_by_id(connection, called(connection, function))
    if binding is None:
        raise BindingError(
            f"{identity} was bound, and this role cannot see its binding. Let the owner of the "
            "schema sbert run: SELECT sbert.grant_v1(role, 'binder')."
        )
    return binding


def _replaced(connection: Connection, column: Any, identity: ColumnIdentity) -> str | None:
    """What an embedding column declares that it replaces; one that is gone, as after *finish*, or
    was never in this database is not replaced.
    """
    old: str | None = getattr(getattr(column, "type", None), "replaces", None)
    if old is None or old in column.table.c:
        return old
    return old if binding_of(connection, identity._replace(column=old)) is not None else None


def create_all(connection: Connection, metadata: sa.MetaData) -> list[Binding]:
    """Create the catalog and the tables of some metadata, and bind every embedding column.

    What ``metadata.create_all`` is for plain tables: for tests, scripts and first steps. Tables
    that are there are left as they are and bound. An application with a history of migrations binds
    in a revision, which autogenerate writes.

    Args:
        connection: a connection of a role that may create the extension ``vector``, where it is
            missing, the schema ``sbert`` and the tables.
        metadata: the tables' metadata.

    Returns:
        The bindings, in the order of dependent tables.

    Raises:
        DeclarationError: an engine was given, or an asynchronous connection, or a class for its
            metadata.
        CatalogVersionError: the catalog is newer than this code.
        BindingError: see ``bind``.
    """
    require_connection("create_all", connection)
    if not hasattr(metadata, "sorted_tables"):
        name = getattr(metadata, "__name__", "Base")
        raise DeclarationError(
            f"create_all() takes the tables' metadata and got {metadata!r}. Give {name}.metadata."
        )
    upgrade(connection)
    metadata.create_all(connection)
    # A column that is replaced has to be bound before the one that replaces it.
    columns = [
        column
        for table in metadata.sorted_tables
        for column in table.columns
        if getattr(column.type, "encoder", None) is not None
    ]
    columns.sort(key=lambda column: getattr(column.type, "replaces", None) is not None)
    return [bind(connection, column) for column in columns]


def unbind(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> None:
    """Undo ``bind``: triggers, indexes and catalog row. The columns and their vectors stay.

    Raises:
        NotBoundError: it is not bound.
    """
    identity = identity_of(column)
    relation = sa.cast(qualified(connection, identity), pg.REGCLASS)
    if not called(connection, sa.func.sbert.unbind_v1(relation, identity.column)):
        raise NotBoundError(f"Column {identity} is not bound, so there is nothing to undo.")


def queue_indexes(connection: Connection, binding: Binding) -> list[QueueIndex]:
    """The two indexes that a binding needs, and what is there of them.

    An index is recognised by what it says, never by its name.
    """
    names = ("kind", "name", "definition", "existing", "valid")
    row = sa.func.sbert.queue_ddl_v1(binding.id).table_valued(*names, name="queue")
    existing = sa.cast(row.c.existing, sa.Text).label("existing")
    rows = connection.execute(
        sa.select(row.c.kind, row.c.name, row.c.definition, existing, row.c.valid)
    )
    return [QueueIndex(r.kind, r.name, r.definition, r.existing, bool(r.valid)) for r in rows]


def build_queue(
    connection: Connection, binding: Binding, *, lock_timeout: float | None = None
) -> None:
    """Build the indexes of a binding that are missing or not valid, beside live traffic.

    Args:
        connection: a connection in autocommit mode.
        binding: the binding; its table is not partitioned.
        lock_timeout: see ``index_builder``.

    Raises:
        TableBusyError: a lock was not to be had, or another session has been building for too long.
    """
    missing = [index for index in queue_indexes(connection, binding) if not index.valid]
    if not missing:
        return
    unquoted = connection.dialect.identifier_preparer.unformat_identifiers
    with index_builder(
        connection, binding.table, binding.schema, lock_timeout=lock_timeout
    ) as builder:
        for index in missing:
            builder.wait_for_others([index.name], QUEUE_WAIT)
            if index.existing is not None and unquoted(index.existing)[-1] != index.name:
                builder.drop(unquoted(index.existing)[-1])
            builder.create_as(index.name, index.definition)
