"""Bindings: which encoder and source a vector column belongs to, for life.

A binding starts *declared*: a migration has said the encoder's name. The first process that uses
the column with a loaded encoder *seals* it: fingerprint, spec and probe vectors are written once.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection

from sbert_pg.catalog.holding import Held, attest, check, hold, hold_encoder, rebind, seal
from sbert_pg.catalog.migrate import upgrade
from sbert_pg.catalog.reading import (
    all_bindings,
    binding_by_id,
    binding_of,
    identity_of,
    installed,
    qualified,
)
from sbert_pg.catalog.record import Binding
from sbert_pg.catalog.sqlstates import translated
from sbert_pg.errors import BindingError, NotBoundError
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.types.guard import ColumnIdentity


def bind(
    connection: Connection,
    column: ColumnIdentity | sa.Column[Any],
    encoder: EncoderSpec | None = None,
    source: Source | None = None,
    *,
    replaces: str | None = None,
    mark_pending: bool = False,
) -> Binding:
    """Bind a vector column: the catalog row and the triggers. The same again changes nothing.

    Locks writers out of the table until the transaction ends.

    Args:
        connection: a connection; its role owns the table.
        column: an embedding column of a table, or the identity of any vector column.
        encoder: the encoder as declared; an embedding column brings its own.
        source: what the text is made of; an embedding column brings its own.
        replaces: name of the bound column of the same table that this one is to replace.
        mark_pending: mark the rows that have no vector yet; without it they are a backfill's.

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
            mark_pending,
        )
    )
    with translated():
        number = connection.execute(statement).scalar_one()
    found = binding_by_id(connection, number)
    assert found is not None
    return found


def bind_all(
    connection: Connection, metadata: sa.MetaData, *, mark_pending: bool = False
) -> list[Binding]:
    """Bring the catalog to its newest version and bind every embedding column of some metadata.

    What ``metadata.create_all`` is to tables: for tests, scripts and first steps. An application
    with a history of migrations binds in a revision, which autogenerate writes.

    Args:
        connection: a connection; its role owns the tables, which exist.
        metadata: the tables' metadata.
        mark_pending: see ``bind``.

    Returns:
        The bindings, in the order of dependent tables.

    Raises:
        CatalogVersionError: the catalog is newer than this code.
        BindingError: see ``bind``.
    """
    upgrade(connection)
    # A column that is replaced has to be bound before the one that replaces it.
    columns = [
        column
        for table in metadata.sorted_tables
        for column in table.columns
        if getattr(column.type, "encoder", None) is not None
    ]
    columns.sort(key=lambda column: getattr(column.type, "replaces", None) is not None)
    return [bind(connection, column, mark_pending=mark_pending) for column in columns]


def unbind(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> None:
    """Undo ``bind``: triggers, marks and catalog row. The column and its vectors stay.

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


def require_binding(connection: Connection, column: ColumnIdentity | sa.Column[Any]) -> Binding:
    """As ``binding_of``, for columns that have to be bound.

    Raises:
        NotBoundError: it is not bound, or the catalog is not installed.
    """
    found = binding_of(connection, column)
    if found is None:
        raise NotBoundError(
            f"Column {identity_of(column)} is not bound to an encoder in this database. A "
            "migration binds it (alembic revision --autogenerate), or sbert_pg.catalog.bind()."
        )
    return found


__all__ = [
    "Binding",
    "Held",
    "all_bindings",
    "attest",
    "bind",
    "binding_by_id",
    "binding_of",
    "check",
    "hold",
    "hold_encoder",
    "installed",
    "rebind",
    "require_binding",
    "seal",
    "unbind",
]
