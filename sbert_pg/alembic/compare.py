"""Autogenerate: what the models say of embedding columns and vector indexes, against the database.

Runs after Alembic's own comparison and rewrites what that found: a new embedding column is more
than a column, and of vector indexes Alembic compares hardly more than the names. Operations come in
an order in which they work: what is dropped first, then the application's own, then columns before
bindings before indexes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.operations import ops as alembic_ops
from alembic.operations.ops import MigrateOperation, UpgradeOps
from alembic.util.sqla_compat import _get_constraint_final_name

from sbert_pg import catalog
from sbert_pg.alembic import differing, ops
from sbert_pg.alembic.declaration import Declaration, IndexDefinition, definition_of, method_of
from sbert_pg.alembic.dropping import in_drop_order
from sbert_pg.alembic.index_ops import CreateVectorIndexOp, DropVectorIndexOp
from sbert_pg.alembic.reading import indexes_of, same
from sbert_pg.alembic.toimpl import reached
from sbert_pg.catalog import Binding, tables
from sbert_pg.types import Embedding
from sbert_pg.types.vector import VectorType

#: Rows that may be without a vector when an index is built: maintaining it for so few is cheap.
MAX_MISSING = 10_000

Key = tuple[str | None, str]


def rewrite(context: AutogenContext, upgrade_ops: UpgradeOps) -> None:
    """Rewrite Alembic's operations, in place.

    Raises:
        ChangedColumnError: an encoder, source or storage was changed under its column's name.
    """
    if context.dialect.name != "postgresql" or context.connection is None:
        return
    comparison = Comparison(context, context.connection)
    comparison.read(upgrade_ops)
    comparison.compare()
    differing.refuse(comparison.changes)
    upgrade_ops.ops[:] = comparison.result()


class Comparison:
    """One run of autogenerate on one database."""

    def __init__(self, context: AutogenContext, connection: sa.Connection) -> None:
        self.context = context
        self.connection = connection
        self.default_schema = connection.dialect.default_schema_name
        self.tables = {self.key(t.schema, t.name): t for t in context.sorted_tables}
        self.bindings: dict[tuple[str | None, str, str], Binding] = {
            (*self.key(b.schema, b.table), b.column): b for b in catalog.all_bindings(connection)
        }
        self.compatible = _compatible_names(connection) if self.bindings else {}
        self.created: set[Key] = set()
        self.added: set[tuple[str | None, str, str]] = set()
        self.index_tables: set[Key] = set()
        self.before: list[MigrateOperation] = []
        self.middle: list[MigrateOperation] = []
        self.after: list[MigrateOperation] = []
        self.required: set[tuple[str | None, str, str]] = set()
        self.finishing: dict[tuple[str | None, str, str], ops.FinishReplacementOp] = {}
        self.changes: list[differing.Change] = []

    def key(self, schema: str | None, table: str) -> Key:
        """A table as Alembic names it: without the search path's first schema."""
        return (None if schema == self.default_schema else schema, table)

    # What Alembic found.

    def read(self, upgrade_ops: UpgradeOps) -> None:
        """Sort Alembic's operations, and replace those that are about embedding columns."""
        ordered = in_drop_order(upgrade_ops.ops, self.key)
        found = [op for op in ordered if getattr(op, "schema", None) != catalog.SCHEMA]
        dropped = {
            self.key(op.schema, op.table_name)
            for op in found
            if isinstance(op, alembic_ops.DropTableOp)
        }
        for op in found:
            if isinstance(op, alembic_ops.CreateTableOp):
                self._created_table(op)
            elif isinstance(op, alembic_ops.DropTableOp):
                self._dropped_table(op)
            elif isinstance(op, alembic_ops.ModifyTableOps):
                self._modified_table(op, self.key(op.schema, op.table_name) in dropped)
            else:
                self.middle.append(op)

    def _created_table(self, op: alembic_ops.CreateTableOp) -> None:
        key = self.key(op.schema, op.table_name)
        self.created.add(key)
        self.middle.append(op)
        table = self.tables.get(key)
        if table is None:
            return
        for column in self._embeddings(table):
            declared = self._declaration(key, column)
            self.middle.append(
                ops.BindEmbeddingColumnOp(key[1], column.name, declared, schema=op.schema)
            )
        for index, definition in self._wanted(table, op.schema):
            self.middle.append(CreateVectorIndexOp(definition, concurrently=False, name=index.name))

    def _dropped_table(self, op: alembic_ops.DropTableOp) -> None:
        key = self.key(op.schema, op.table_name)
        for (schema, table, column), binding in self.bindings.items():
            if (schema, table) == key:
                bound = ops.BindEmbeddingColumnOp(
                    table, column, _declared(binding), schema=op.schema
                )
                self.middle.append(
                    ops.UnbindEmbeddingColumnOp(table, column, schema=op.schema, bound=bound)
                )
        self.middle.append(op)

    def _modified_table(self, op: alembic_ops.ModifyTableOps, is_dropped: bool) -> None:
        key = self.key(op.schema, op.table_name)
        kept: list[Any] = []
        for inner in op.ops:
            if isinstance(inner, (alembic_ops.CreateIndexOp, alembic_ops.DropIndexOp)):
                index = inner.to_index()
                if method_of(index) is None:
                    kept.append(inner)
                elif not is_dropped:
                    self.index_tables.add(key)
            elif not self._column(key, inner):
                kept.append(inner)
        if is_dropped:
            self._indexes_of_dropped(key, op.schema)
        if kept:
            op.ops[:] = kept
            self.middle.append(op)

    def _indexes_of_dropped(self, key: Key, schema: str | None) -> None:
        for definition, _ in indexes_of(self.connection, key[1], schema).values():
            self.middle.append(DropVectorIndexOp(definition, concurrently=False))

    def _column(self, key: Key, op: MigrateOperation) -> bool:
        """Take an operation on a column over, where it is about an embedding column."""
        if isinstance(op, alembic_ops.AddColumnOp) and isinstance(op.column.type, Embedding):
            self.added.add((*key, op.column.name))
            return True
        if isinstance(op, alembic_ops.DropColumnOp):
            binding = self.bindings.get((*key, op.column_name))
            if binding is not None:
                self.before.append(self._drop(key, binding))
            return binding is not None
        if isinstance(op, alembic_ops.AlterColumnOp):
            return self._altered(key, op)
        return False

    def _altered(self, key: Key, op: alembic_ops.AlterColumnOp) -> bool:
        """Never change the type of a column whose vectors would not survive it."""
        place = (*key, op.column_name)
        table = self.tables.get(key)
        column = None if table is None else _column_named(table, op.column_name)
        is_vector = column is not None and isinstance(column.type, VectorType)
        if place in self.bindings or (column is not None and isinstance(column.type, Embedding)):
            if op.modify_type is not None and is_vector:
                if place not in self.bindings:
                    differing.refuse_width(place, op.existing_type, op.modify_type)
                # What became of a bound column is found by comparing it with its binding.
                op.modify_type = None
            if op.modify_nullable is False:
                self.before.append(self._require(place, 0))
            return not op.has_changes()
        if is_vector and op.modify_type is not None:
            self._refuse_if_filled(place, op)
        return False

    def _refuse_if_filled(
        self, place: tuple[str | None, str, str], op: alembic_ops.AlterColumnOp
    ) -> None:
        old, new = op.existing_type, op.modify_type
        if getattr(old, "dimensions", None) == getattr(new, "dimensions", None):
            return
        column: sa.ColumnClause[Any] = sa.column(place[2])
        table = sa.table(place[1], column, schema=place[0])
        filled = sa.select(sa.literal(1)).select_from(table).where(column.is_not(None)).limit(1)
        if self.connection.execute(filled).first() is not None:
            differing.refuse_width(place, old, new)

    def _drop(self, key: Key, binding: Binding) -> MigrateOperation:
        added = self._add_op(key, binding.column, _declared(binding))
        declared = self._declared_places(key)
        replacement = next(
            (
                other.column
                for (schema, table, _), other in self.bindings.items()
                if (schema, table) == key
                and other.replaces == binding.column
                and (*key, other.column) in declared
            ),
            None,
        )
        if replacement is None:
            return ops.DropEmbeddingColumnOp(key[1], binding.column, schema=key[0], added=added)
        place = (*key, binding.column)
        self.finishing[place] = ops.FinishReplacementOp(
            key[1], binding.column, schema=key[0], added=added, replacement=replacement
        )
        return self.finishing[place]

    def _declared_places(self, key: Key) -> set[tuple[str | None, str, str]]:
        table = self.tables.get(key)
        return set() if table is None else {(*key, c.name) for c in self._embeddings(table)}

    # What Alembic does not look at.

    def compare(self) -> None:
        """Compare bindings and vector indexes of the tables that are there."""
        for key, table in self.tables.items():
            if key in self.created or not self._in_scope(table):
                continue
            self._compare_bindings(key, table)
            if key in self.index_tables or any(isinstance(c.type, VectorType) for c in table.c):
                self._compare_indexes(key, table)

    def _in_scope(self, table: sa.Table) -> bool:
        return self.context.run_object_filters(table, table.name, "table", False, None)

    def _compare_bindings(self, key: Key, table: sa.Table) -> None:
        for column in self._embeddings(table):
            place = (*key, column.name)
            binding = self.bindings.get(place)
            if place in self.added:
                self.after.append(self._add_op(key, column.name, self._declaration(key, column)))
            elif binding is None:
                bound = ops.BindEmbeddingColumnOp(
                    key[1],
                    column.name,
                    self._declaration(key, column),
                    schema=key[0],
                    mark_pending=True,
                    concurrently=True,
                )
                self.after.append(bound)
            else:
                names = self.compatible.get(binding.id, set())
                change = differing.change_of(binding, column, names)
                change = change or self._replacement_change(key, binding, column)
                if change is not None:
                    self.changes.append(change)
        for place, binding in self.bindings.items():
            declared = _column_named(table, binding.column)
            if place[:2] == key and declared is not None:
                self._compare_plain(key, declared, binding)

    def _compare_plain(self, key: Key, column: sa.Column[Any], binding: Binding) -> None:
        """A bound column that the models declare as something else is let go."""
        if isinstance(column.type, Embedding):
            return
        bound = ops.BindEmbeddingColumnOp(
            key[1],
            column.name,
            _declared(binding),
            schema=key[0],
            trust_vectors=True,
            concurrently=True,
        )
        self.before.append(
            ops.UnbindEmbeddingColumnOp(
                key[1], column.name, schema=key[0], bound=bound, concurrently=True
            )
        )

    def _replacement_change(
        self, key: Key, binding: Binding, column: sa.Column[Any]
    ) -> differing.Change | None:
        """Whether the models say differently which column this one replaces."""
        wanted = self._declaration(key, column).replaces
        found = binding.replaces
        if found is not None and (*key, found) not in self._declared_places(key):
            # The old column goes now, and with it what it was replaced by.
            return None
        if wanted == found:
            return None
        return differing.Change(binding, column, f"replaces={found!r} became {wanted!r}", False)

    def _compare_indexes(self, key: Key, table: sa.Table) -> None:
        found = {
            name: index
            for name, index in indexes_of(self.connection, key[1], key[0]).items()
            if self.context.run_name_filters(
                name, "index", {"table_name": key[1], "schema_name": key[0]}
            )
        }
        for index, definition in self._wanted(table, key[0]):
            there, valid = found.pop(definition.name, (None, True))
            if there is not None and valid and same(self.connection, definition, there):
                continue
            existing = there if valid else None
            place = (*key, definition.column)
            column = _column_named(table, definition.column)
            if column is not None and isinstance(column.type, Embedding):
                if place not in self.required:
                    self.after.append(self._require(place, MAX_MISSING))
                self.required.add(place)
            self.after.append(CreateVectorIndexOp(definition, existing=existing, name=index.name))
        self._superfluous(key, found)

    def _superfluous(self, key: Key, found: dict[str, tuple[IndexDefinition, bool]]) -> None:
        """Indexes that the models do not have any more."""
        for definition, _ in found.values():
            reflected = sa.Index(definition.name)
            if not self.context.run_object_filters(reflected, definition.name, "index", True, None):
                continue
            finishing = self.finishing.get((*key, definition.column))
            if finishing is None:
                self.before.insert(0, DropVectorIndexOp(definition))
            else:
                # Whoever still uses the old column needs its index until the column goes.
                finishing.indexes.append(CreateVectorIndexOp(definition))

    # Pieces.

    def _embeddings(self, table: sa.Table) -> list[sa.Column[Any]]:
        """Embedding columns, a replaced one before its replacement."""
        found = [
            column
            for column in table.columns
            if isinstance(column.type, Embedding)
            and self.context.run_object_filters(column, column.name, "column", False, None)
        ]
        return sorted(found, key=lambda column: _depth(table, column))

    def _wanted(
        self, table: sa.Table, schema: str | None
    ) -> Iterator[tuple[sa.Index, IndexDefinition]]:
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            if method_of(index) is None:
                continue
            name = str(_get_constraint_final_name(index, self.context.dialect))
            if self.context.run_object_filters(index, name, "index", False, None):
                yield index, definition_of(index, name, schema)

    def _declaration(self, key: Key, column: sa.Column[Any]) -> Declaration:
        """As declared; a column that is gone, or was never there, is not replaced any more."""
        type_ = column.type
        assert isinstance(type_, Embedding)
        declared = Declaration.of_type(type_)
        old = type_.replaces
        if old is None or (*key, old) in self.bindings or (*key, old) in self._declared_places(key):
            return declared
        return Declaration(declared.encoder, declared.source, declared.storage)

    def _add_op(self, key: Key, column: str, declared: Declaration) -> ops.AddEmbeddingColumnOp:
        kind = ops.AddEmbeddingColumnOp if declared.replaces is None else ops.BeginReplacementOp
        return kind(key[1], column, declared, schema=key[0], mark_pending=True)

    def _require(
        self, place: tuple[str | None, str, str], max_missing: int
    ) -> ops.RequireBackfillOp:
        schema, table, column = place
        return ops.RequireBackfillOp(table, column, max_missing=max_missing, schema=schema)

    def result(self) -> list[MigrateOperation]:
        """All operations, in an order in which they work."""
        found = [*self.before, *self.middle, *self.after]
        declaring = any(isinstance(op, ops.DeclaringOperation) for op in found)
        if declaring or self._has_embeddings():
            current, head = catalog.current(self.connection), catalog.head()
            behind = current is None or _is_older(current, head)
            if behind or declaring:
                found.insert(0, ops.UpgradeSchemaOp(head, previous=current))
        return found

    def _has_embeddings(self) -> bool:
        return any(
            self._in_scope(table) and self._embeddings(table) for table in self.tables.values()
        )


def _is_older(current: str, head: str) -> bool:
    """Whether a revision of the catalog comes before the newest one that this code knows."""
    return current != head and current in reached(head)


def _declared(binding: Binding) -> Declaration:
    return Declaration(binding.declared, binding.source, binding.storage, binding.replaces)


def _column_named(table: sa.Table, name: str) -> sa.Column[Any] | None:
    return next((column for column in table.columns if column.name == name), None)


def _depth(table: sa.Table, column: sa.Column[Any]) -> int:
    """How many columns a column replaces, one after the other."""
    depth, seen = 0, {column.name}
    current: sa.Column[Any] | None = column
    while current is not None and isinstance(current.type, Embedding) and current.type.replaces:
        current = _column_named(table, current.type.replaces)
        if current is None or current.name in seen:
            break
        seen.add(current.name)
        depth += 1
    return depth


def _compatible_names(connection: sa.Connection) -> dict[int, set[str]]:
    """Names of the encoders that were proven compatible, by binding."""
    known = tables.compatible_encoder
    found: dict[int, set[str]] = {}
    for number, name in connection.execute(
        sa.select(known.c.column_id, known.c.spec["name"].astext)
    ):
        found.setdefault(number, set()).add(name)
    return found
