"""The two columns of a change, as the database has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors

from sbert_pg import catalog
from sbert_pg.catalog import Binding, system
from sbert_pg.errors import ReembeddingError
from sbert_pg.reembedding.vector_index import VectorIndex, vector_indexes
from sbert_pg.spec import EncoderSpec
from sbert_pg.types import Embedding, register_reflection
from sbert_pg.types.guard import ColumnIdentity


@dataclass(frozen=True)
class Side:
    """A bound column: its binding, and itself on a reflected table with its valid indexes.

    Attributes:
        binding: what the catalog says.
        column: the column, of type ``Embedding``.
        indexes: its vector indexes, valid or not.
    """

    binding: Binding
    column: sa.Column[Any]
    indexes: tuple[VectorIndex, ...]

    @property
    def spec(self) -> EncoderSpec:
        """The encoder as declared, under whose name it is registered or loaded."""
        return self.binding.declared

    @property
    def valid_index(self) -> VectorIndex | None:
        """An index that queries may use, one without a predicate before one with."""
        valid = [index for index in self.indexes if index.valid]
        return min(valid, key=lambda index: index.predicate is not None, default=None)


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


def identity(table: str, column: str, schema: str | None = None) -> ColumnIdentity:
    """A column by names; ``table`` may be ``schema.table``."""
    if schema is None and "." in table:
        schema, table = table.split(".", 1)
    return ColumnIdentity(schema, table, column)


def replacement_of(connection: sa.Connection, old: Binding) -> Binding | None:
    """The binding that is to replace a column, where one has been begun."""
    for candidate in catalog.all_bindings(connection):
        if candidate.relation == old.relation and candidate.replaces == old.column:
            return candidate
    return None


def pair_of(connection: sa.Connection, column: ColumnIdentity) -> Pair:
    """The change that a column takes part in, named by its old or its new column.

    Raises:
        NotBoundError: the column is not bound.
    """
    binding = catalog.require_binding(connection, column)
    newer = replacement_of(connection, binding)
    return _pair(connection, newer or binding)


def change_of(connection: sa.Connection, column: ColumnIdentity) -> Pair:
    """As ``pair_of``, where both columns have to be there.

    Raises:
        NotBoundError: the column is not bound.
        ReembeddingError: it replaces nothing, and nothing replaces it.
    """
    found = pair_of(connection, column)
    if found.old is None:
        raise ReembeddingError(
            f"{column} replaces no column and none replaces it, so there is no change to go on "
            "with. 'sbert-pg reembed start' begins one."
        )
    return found


def _pair(connection: sa.Connection, new: Binding) -> Pair:
    table = reflect(connection, new.schema, new.table)
    old = None
    if new.replaces is not None:
        old = catalog.binding_of(connection, ColumnIdentity(new.schema, new.table, new.replaces))
    relation = system.relation_name(table, connection)
    return Pair(
        table=table,
        relation=relation,
        new=_side(connection, table, relation, new),
        old=None if old is None else _side(connection, table, relation, old),
    )


def _side(connection: sa.Connection, table: sa.Table, relation: str, binding: Binding) -> Side:
    column = table.c[binding.column]
    # As declared: encoders are registered and held against the binding under that name.
    column.type = Embedding(binding.declared, binding.source, storage=binding.storage)
    indexes = vector_indexes(connection, relation, binding.column)
    for index in indexes:
        if index.valid:
            # Attaches itself to the table, where nearest() looks for it.
            index.on(column, index.name)
    return Side(binding, column, indexes)


def reflect(connection: sa.Connection, schema: str | None, name: str) -> sa.Table:
    """A table as it is, without its indexes and foreign keys, which nobody here asks for."""
    register_reflection()
    inspector = sa.inspect(connection)
    columns: Sequence[Any] = inspector.get_columns(name, schema)
    keys = inspector.get_pk_constraint(name, schema)["constrained_columns"]
    made = [sa.Column(c["name"], c["type"], primary_key=c["name"] in keys) for c in columns]
    return sa.Table(name, sa.MetaData(), *made, schema=schema)
