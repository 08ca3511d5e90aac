"""Bind columns and look bindings up: which encoder and source a vector column belongs to.

A binding starts *declared*: a migration has said the encoder's name. The first process that uses
the column with a loaded encoder *seals* it: fingerprint, spec and probe vectors are written once.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.catalog import tables
from sbert_pg.catalog.migrate import upgrade
from sbert_pg.catalog.record import (
    Binding,
    expressions_of,
    known_id,
    qualified,
    read_expressions,
)
from sbert_pg.catalog.tables import SCHEMA
from sbert_pg.distance import Storage
from sbert_pg.errors import BindingError, CatalogError, NotBoundError
from sbert_pg.indexes import index_builder
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.sqlstates import translated
from sbert_pg.types.identity import ColumnIdentity, identity_of

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
        replaces: name of the bound column of the same table that this one is to replace.
        build: create the two indexes here. Without it they are the caller's, who creates them
            concurrently; see ``queue_indexes``.

    Raises:
        AlreadyBoundError: it is bound to another encoder or source.
        NotBoundError: the column to be replaced is not bound.
        BindingError: it cannot be bound, or nothing says to what; the message says why.
    """
    type_ = getattr(column, "type", None)
    encoder = encoder or getattr(type_, "encoder", None)
    source = source or getattr(type_, "source", None)
    replaces = replaces or getattr(type_, "replaces", None)
    identity = identity_of(column)
    if encoder is None or source is None:
        raise BindingError(
            f"{identity} is not an embedding column, so bind() has to be given its encoder and "
            "source."
        )
    statement = sa.select(
        sa.func.sbert.bind_v1(
            sa.cast(qualified(connection, identity), pg.REGCLASS),
            identity.column,
            sa.cast(encoder.to_json(), pg.JSONB),
            sa.cast(source.to_json(), pg.JSONB),
            sa.cast(replaces, sa.Text),
            not build,
            type_=sa.Uuid(),
        )
    )
    with translated():
        binding_id = connection.execute(statement).scalar_one()
    binding = binding_by_id(connection, binding_id)
    if binding is None:
        raise BindingError(
            f"{identity} was bound, and this role cannot see its binding. Let the owner of the "
            "schema sbert run: SELECT sbert.grant_v1(role, 'binder')."
        )
    return binding


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
        CatalogVersionError: the catalog is newer than this code.
        BindingError: see ``bind``.
    """
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
    statement = sa.select(
        sa.func.sbert.unbind_v1(
            sa.cast(qualified(connection, identity), pg.REGCLASS), identity.column
        )
    )
    with translated():
        was_bound = connection.execute(statement).scalar_one()
    if not was_bound:
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


def require_all_rows(connection: Connection, binding: Binding) -> None:
    """Refuse to speak of a table of which this role sees a part.

    Raises:
        BindingError: row-level security hides rows from this role.
    """
    active = sa.func.row_security_active(sa.cast(binding.relation, pg.OID))
    if connection.execute(sa.select(active)).scalar_one():
        raise BindingError(
            f"Row-level security applies to this role on {binding.schema}.{binding.table}, so rows "
            "could be left out unnoticed. Run as the table's owner or as a role with BYPASSRLS."
        )


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


def health(connection: Connection, binding: Binding) -> list[str]:
    """What is wrong with a binding, in words; empty where nothing is.

    Judged by what is there: indexes and triggers by their content, names by the columns that they
    mean today. Binding again mends what can be mended.
    """
    problem = sa.func.sbert.health_v1(binding.id).column_valued("problem")
    return list(connection.execute(sa.select(problem)).scalars())


def binding_of(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding | None:
    """The binding of a column, or ``None`` where it, or the whole catalog, is not there.

    Args:
        connection: a connection to the database.
        column: a column of a table, or its identity. A partition stands for its table, and a
            ``schema_translate_map`` of the connection is followed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    identity = identity_of(column)
    if not installed(connection):
        return None
    # In one statement: between two the column may change hands, and would seem not to be bound.
    known = sa.select(known_id(connection, identity)).scalar_subquery()
    return _first(connection, tables.binding.c.id == known)


def require_binding(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding:
    """As ``binding_of``, for columns that have to be bound.

    Raises:
        NotBoundError: it is not bound, or the catalog is not installed.
    """
    binding = binding_of(connection, column)
    if binding is None:
        raise NotBoundError(
            f"Column {identity_of(column)} is not bound to an encoder in this database. A "
            "migration binds it (alembic revision --autogenerate), or sbert_pg.catalog.bind()."
        )
    return binding


def binding_by_id(connection: Connection, binding_id: uuid.UUID) -> Binding | None:
    """The binding with an identity, or ``None``."""
    return _first(connection, tables.binding.c.id == binding_id)


def all_bindings(connection: Connection) -> list[Binding]:
    """Every binding whose table exists, oldest first; none where the catalog is not installed.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    if not installed(connection):
        return []
    c = tables.binding.c
    return [
        _from_row(row) for row in connection.execute(_select().order_by(c.created_at, c.relation))
    ]


def installed(connection: Connection) -> bool:
    """Whether the catalog is in the database.

    Raises:
        CatalogError: it is, and this role may not use it.
    """
    if connection.dialect.name != "postgresql":
        return False
    row = connection.execute(
        sa.select(sa.func.has_schema_privilege(system.NAMESPACE.c.oid, "USAGE")).where(
            system.NAMESPACE.c.nspname == SCHEMA,
            sa.exists().where(
                system.CLASS.c.relnamespace == system.NAMESPACE.c.oid,
                system.CLASS.c.relname == tables.binding.name,
            ),
        )
    ).first()
    if row is not None and not row[0]:
        role = connection.execute(sa.select(sa.func.current_user())).scalar_one()
        raise CatalogError(
            f"The role {role!r} may not use the schema {SCHEMA!r}. Let its owner run: "
            f"SELECT sbert.grant_v1('{role}', 'writer')"
        )
    return row is not None


def _first(connection: Connection, *where: sa.ColumnElement[bool]) -> Binding | None:
    row = connection.execute(_select().where(*where)).first()
    return None if row is None else _from_row(row)


def _select() -> sa.Select[Any]:
    """Bindings whose table exists; rows are read by ``_from_row``."""
    binding, encoder = tables.binding, tables.encoder
    replaced = binding.alias("replaced")
    return (
        sa.select(
            binding.c.id,
            sa.cast(sa.cast(binding.c.relation, pg.OID), sa.BigInteger).label("relation"),
            sa.cast(system.NAMESPACE.c.nspname, sa.Text).label("schema"),
            sa.cast(system.CLASS.c.relname, sa.Text).label("table"),
            binding.c.column_name,
            binding.c.companion,
            binding.c.declared,
            binding.c.source,
            binding.c.key_columns,
            _key_types(binding).label("key_types"),
            binding.c.null_text,
            binding.c.storage,
            binding.c.state,
            replaced.c.column_name.label("replaces"),
            (system.CLASS.c.relkind == "p").label("partitioned"),
            encoder.c.spec,
            encoder.c.fingerprint,
            # now() is the start of the transaction: its own seal can still be rolled back.
            sa.func.coalesce(binding.c.sealed_at == sa.func.now(), sa.false()).label("sealed_here"),
            (sa.func.current_setting("server_encoding") == "UTF8").label("utf8"),
            expressions_of(binding.c.id).label("expressions"),
        )
        .select_from(binding)
        .join(system.CLASS, system.CLASS.c.oid == binding.c.relation)
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == system.CLASS.c.relnamespace)
        .outerjoin(encoder, encoder.c.id == binding.c.encoder_id)
        .outerjoin(replaced, replaced.c.id == binding.c.replaces_id)
    )


def _key_types(binding: sa.FromClause) -> sa.ScalarSelect[Any]:
    """Types of the key columns, in order, domains resolved to what they are made of."""
    name = (
        sa.func.unnest(binding.c.key_columns)
        .table_valued(sa.column("name", sa.Text), with_ordinality="position", name="key_column")
        .render_derived()
    )  # fmt: skip
    # -1 and not NULL, which would spell char(n) as a type of one character.
    spelt = sa.func.format_type(sa.func.sbert.base_type_v1(system.ATTRIBUTE.c.atttypid), -1)
    return (
        sa.select(sa.func.array_agg(pg.aggregate_order_by(spelt, name.c.position)))
        .select_from(name)
        .join(
            system.ATTRIBUTE,
            sa.and_(
                system.ATTRIBUTE.c.attrelid == binding.c.relation,
                system.ATTRIBUTE.c.attname == name.c.name,
            ),
        )
        .correlate(binding)
        .scalar_subquery()
    )


def _from_row(row: sa.Row[Any]) -> Binding:
    return Binding(
        id=row.id,
        relation=row.relation,
        schema=row.schema,
        table=row.table,
        column=row.column_name,
        companion=row.companion,
        declared=EncoderSpec.from_json(row.declared),
        source=Source.from_json(row.source),
        key_columns=tuple(row.key_columns),
        key_types=tuple(row.key_types or ()),
        null_text=row.null_text,
        storage=cast(Storage, row.storage),
        state=row.state,
        replaces=row.replaces,
        partitioned=row.partitioned,
        sealed=None if row.spec is None else EncoderSpec.from_json(row.spec),
        fingerprint=row.fingerprint,
        sealed_here=row.sealed_here,
        utf8=row.utf8,
        expressions=read_expressions(row.expressions),
    )
