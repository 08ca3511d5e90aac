"""A change of encoder: what is asked for, the two columns that take part, and how it begins."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID
from sqlalchemy.sql import visitors

from sbert_pg import catalog, system
from sbert_pg.catalog import Binding
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.catalog.record import relation_of
from sbert_pg.distance import STORAGES, Storage
from sbert_pg.errors import AlreadyBoundError, DimensionError, ReembeddingError
from sbert_pg.indexes import StoredIndex, build_index, index_like, index_name, vector_indexes
from sbert_pg.progress import Advance
from sbert_pg.reembed.status import operations_on, replacement_of, sides_of
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec
from sbert_pg.system import ATTEMPTS, LOCK_TIMEOUT, ColumnIdentity, in_short_transactions
from sbert_pg.types.comparator import clause_of
from sbert_pg.types.vector import VectorType, plain_type

#: Bytes of a table below which indexes are built while it is locked: some tens of milliseconds.
SMALL = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A change of encoder, as it is asked for.

    Attributes:
        old: the column to be replaced; it is bound.
        new: name of the new column.
        encoder: the new encoder.
        source: the new source; the old column's by default.
        storage: ``"vector"`` or ``"halfvec"``; the old column's by default.
    """

    old: ColumnIdentity
    new: str
    encoder: EncoderSpec
    source: Source | None = None
    storage: Storage | None = None


def request_of(column: Any) -> Request:
    """The change that an embedding column declared with ``replaces=`` asks for.

    Args:
        column: a mapped attribute, or a column of a table.

    Raises:
        ReembeddingError: it is not an embedding column, or replaces nothing.
    """
    column = clause_of(column)
    type_ = getattr(column, "type", None)
    if not isinstance(type_, Embedding) or type_.replaces is None:
        raise ReembeddingError(
            f"{column} is not declared as the replacement of a column. Declare it with "
            "embedding_column(..., replaces='the old column')."
        )
    table = column.table
    return Request(
        old=ColumnIdentity(getattr(table, "schema", None), table.name, type_.replaces),
        new=column.name,
        encoder=type_.encoder,
        source=type_.source,
        storage=type_.storage,
    )


@dataclass(frozen=True)
class Side:
    """A bound column: its binding, and itself on a reflected table with all of its indexes."""

    binding: Binding
    column: sa.Column[Any]
    indexes: tuple[StoredIndex, ...]

    @property
    def table(self) -> sa.Table:
        """The reflected table."""
        return self.column.table

    @property
    def spec(self) -> EncoderSpec:
        """The encoder as declared, under whose name it is registered or loaded."""
        return self.binding.declared

    @property
    def valid_index(self) -> StoredIndex | None:
        """An index that queries may use, one of all rows before a partial one."""
        valid = [index for index in self.indexes if index.valid]
        return min(valid, key=lambda index: index.partial, default=None)


@dataclass(frozen=True)
class Pair:
    """A new column and the one that it replaces, on one reflected table.

    Attributes:
        table: the table, with both columns typed and their valid indexes attached.
        relation: its name as text that ``to_regclass`` reads.
        new: the new column.
        old: the replaced one, ``None`` where there is none any more.
    """

    table: sa.Table
    relation: str
    new: Side
    old: Side | None

    def on_table(self, criterion: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """A criterion written on the application's own table, moved to this one."""

        def move(element: Any, **_: Any) -> Any:
            if isinstance(element, sa.Column) and element.table is not self.table:
                return self.table.c.get(element.name)
            return None

        moved: sa.ColumnElement[bool] = visitors.replacement_traverse(criterion, {}, move)
        return moved


def pair_of(connection: sa.Connection, column: ColumnIdentity) -> Pair:
    """As ``sides_of``, with the columns themselves and their indexes."""
    new, old = sides_of(connection, column)
    table = reflect(connection, new.schema, new.table)
    return Pair(
        table=table,
        relation=system.name_of(table.schema, table.name),
        new=side_of(connection, table, new),
        old=None if old is None else side_of(connection, table, old),
    )


def side_of(connection: sa.Connection, table: sa.Table, binding: Binding) -> Side:
    """A bound column of a reflected table, its valid indexes attached to the table."""
    column = table.c[binding.column]
    indexes = vector_indexes(connection, table.name, binding.column, schema=table.schema)
    for index in indexes:
        if index.valid:
            # Attaches itself to the table, where nearest() looks for it.
            index_like(index, column, index.name)
    return Side(binding, column, indexes)


def reflect(connection: sa.Connection, schema: str | None, name: str) -> sa.Table:
    """A table as it is, without indexes and foreign keys; vector columns have their types.

    Bound ones are of type ``Embedding``, as declared: encoders are registered and compared with the
    binding under that name.
    """
    stored = system.stored_types(connection, system.name_of(schema, name))
    types: dict[str, VectorType] = {
        column: plain_type(row.typname, row.atttypmod if row.atttypmod > 0 else None)
        for column, row in stored.items()
        if row.typname in STORAGES
    }
    own = schema or sa.inspect(connection).default_schema_name
    for binding in catalog.all_bindings(connection):
        if (binding.schema, binding.table) == (own, name):
            types[binding.column] = Embedding(
                binding.declared, binding.source, storage=binding.storage
            )

    def give_type(inspector: Any, reflected: sa.Table, column: Any) -> None:
        column["type"] = types.get(column["name"], column["type"])

    with warnings.catch_warnings():
        # SQLAlchemy does not know the types of pgvector, which the listener replaces.
        warnings.filterwarnings("ignore", message="Did not recognize type")
        table = sa.Table(
            name,
            sa.MetaData(),
            schema=schema,
            autoload_with=connection,
            resolve_fks=False,
            listeners=[("column_reflect", give_type)],
        )
    # It reads neither operator classes nor expressions in every release.
    table.indexes.clear()
    return table


def begin(
    engine: sa.Engine,
    request: Request,
    *,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
) -> Binding:
    """Begin a change: add the new column beside the old one and bind it, in one transaction.

    ``ALTER TABLE ... ADD COLUMN`` takes ``ACCESS EXCLUSIVE`` for an instant, rewrites nothing and
    waits for the lock no longer than ``lock_timeout`` at a time. From the commit on every row says
    for both columns whether it is fresh, whichever version of the application writes it.

    Args:
        request: the change.
        lock_timeout: seconds to wait for the table's lock at an attempt.
        attempts: how often to try.

    Returns:
        The new column's binding; the one that is there, where the change has begun before.

    Raises:
        NotBoundError: the old column is not bound.
        AlreadyBoundError: the new column is bound to something else, another column replaces the
            old one already, or the old one is itself the new column of a change under way.
        ReembeddingError: the new column exists and holds something else.
        TableBusyError: the table's lock could not be had.
    """

    def step(connection: sa.Connection) -> Binding:
        old = catalog.require_binding(connection, request.old)
        begun = begun_change(connection, old, request.new)
        if begun is not None and _is_as_asked(begun, old, request):
            return begun
        new = ColumnIdentity(old.schema, old.table, request.new)
        type_ = plain_type(request.storage or old.storage, request.encoder.dimensions)
        _add_column(connection, new, type_)
        return catalog.bind(
            connection,
            new,
            request.encoder,
            request.source or old.source,
            replaces=old.column,
            build=_build_at_once(connection, old.identity),
        )

    binding = in_short_transactions(
        engine,
        step,
        relation=system.name_of(request.old.schema, request.old.table),
        lock_timeout=lock_timeout,
        attempts=attempts,
    )
    build_queue(engine, binding)
    return binding


def begun_change(connection: sa.Connection, old: Binding, new: str) -> Binding | None:
    """The new column of a change that has begun; refused where it has another name than ``new``,
    or where the old column is itself the new one of a change.
    """
    if old.replaces is not None:
        raise AlreadyBoundError(
            f"{old} is itself the new column of a change, and replaces {old.replaces!r}. Finish "
            f"that change (sbert-pg reembed finish {quote(str(old))}) or abort it before another "
            "one begins."
        )
    begun = replacement_of(connection, old)
    if begun is not None and begun.column != new:
        raise AlreadyBoundError(
            f"{old} is being replaced by column {begun.column!r} already. Finish that change or "
            f"abort it (sbert-pg reembed abort {quote(str(begun))}) before another one begins."
        )
    return begun


def build_queue(engine: sa.Engine, binding: Binding) -> None:
    """Build the indexes of a column's queue where they are missing, beside live traffic."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        catalog.build_queue(connection, binding)


def _build_at_once(connection: sa.Connection, column: ColumnIdentity) -> bool:
    """Whether the queue's indexes are built in the transaction that binds: the table is small.

    So are those of a partitioned table, whose indexes cannot be built concurrently.
    """
    relation = relation_of(connection, column)
    partitioned = system.CLASS.c.relkind == "p"
    size = sa.select(sa.or_(partitioned, sa.func.pg_relation_size(relation) < SMALL)).where(
        system.CLASS.c.oid == sa.cast(relation, OID)
    )
    return bool(connection.execute(size).scalar_one())


def _is_as_asked(begun: Binding, old: Binding, request: Request) -> bool:
    """Whether the change has begun already, so that no lock is needed to find out."""
    return (
        begun.declared.name == request.encoder.name
        and begun.dimensions == request.encoder.dimensions
        and begun.source == (request.source or old.source)
        and begun.storage == (request.storage or old.storage)
    )


def _add_column(connection: sa.Connection, column: ColumnIdentity, type_: VectorType) -> None:
    """Add the column unless it is there, with this type and nothing foreign in it."""
    table = reflect(connection, column.schema, column.table)
    there = table.c.get(column.column)
    if there is None:
        operations_on(connection).add_column(
            column.table, sa.Column(column.column, type_, nullable=True), schema=column.schema
        )
        return
    if not isinstance(there.type, VectorType) or there.type.get_col_spec() != type_.get_col_spec():
        raise DimensionError(
            f"{column} exists with type {there.type!r}, and the change needs "
            f"{type_.get_col_spec()}. Choose another name for the new column."
        )
    if catalog.binding_of(connection, column) is None and holds_vectors(connection, column):
        raise ReembeddingError(
            f"{column} exists, holds vectors and is bound to no encoder. Adopt it first "
            "(sbert-pg adopt), or choose another name for the new column."
        )


def holds_vectors(connection: sa.Connection, identity: ColumnIdentity) -> bool:
    """Whether a column has a value in any row."""
    column: sa.ColumnClause[Any] = sa.column(identity.column)
    table = sa.table(identity.table, column, schema=identity.schema)
    filled = sa.select(sa.literal(1)).select_from(table).where(column.is_not(None)).limit(1)
    return connection.execute(filled).first() is not None


def build_indexes(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    indexes: Sequence[sa.Index] | None = None,
    maintenance_work_mem: str | None = None,
    wait: float = 0.0,
    on_progress: Advance | None = None,
    stop: threading.Event | None = None,
) -> list[str]:
    """Build the new column's indexes concurrently, after the bulk of its vectors is there.

    Building afterwards is many times faster than keeping an index up to date during the backfill.
    The other arguments are those of ``build_index``.

    Args:
        column: the new column, or the old one.
        indexes: the indexes to build, as declared; by default one like each of the old column's.

    Returns:
        Names of the new column's indexes, those that were there included.

    Raises:
        TableBusyError: a lock could not be had, or another session is building the index.
        StepStoppedError: ``stop`` was set.
    """
    with engine.connect() as connection:
        pair = pair_of(connection, column)
    missing = list(indexes) if indexes is not None else missing_indexes(pair)
    for index in missing:
        build_index(
            engine,
            index,
            maintenance_work_mem=maintenance_work_mem,
            wait=wait,
            on_progress=on_progress,
            stop=stop,
        )
    there = [index.name for index in pair.new.indexes if index.valid]
    return list(dict.fromkeys([*there, *(str(index.name) for index in missing)]))


def missing_indexes(pair: Pair) -> list[sa.Index]:
    """For each of the old column's valid indexes, one of its kind on the new column.

    An index that the new column has already, of the same form, stands for it.
    """
    if pair.old is None:
        return []
    old, new, table = pair.old.binding.column, pair.new.column, pair.table.name
    forms = {index.form for index in pair.new.indexes if index.valid}
    return [
        index_like(index, new, index_name(index.name, old, new.name, table))
        for index in pair.old.indexes
        if index.valid and index.form not in forms
    ]
