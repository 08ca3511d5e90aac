"""Autogenerate: what the models say of embedding columns and vector indexes, against the database.

Runs after all other comparisons and rewrites what they found: a new embedding column is more than a
column, of vector indexes Alembic compares hardly more than the names, and what belongs to a binding
is not dropped by others. Operations come in an order in which they work: what is dropped first,
then the application's own, then columns before bindings before indexes. A column that is being
replaced is never dropped by the revision that begins its replacement, however the models declare
the change: the next autogenerate writes the drop, which refuses until the new column is complete.

Long, since a comparison is one pass: what each step leaves is what the next one sees.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.operations import ops as alembic_ops
from alembic.operations.ops import MigrateOperation, UpgradeOps

from sbert_pg import catalog
from sbert_pg.alembic import changes, ops
from sbert_pg.alembic.indexes import CreateVectorIndexOp, DropVectorIndexOp
from sbert_pg.alembic.render import in_drop_order
from sbert_pg.alembic.toimpl import reached
from sbert_pg.catalog import Binding
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.indexes import StoredIndex, same_index, vector_indexes
from sbert_pg.reembed.change import holds_vectors
from sbert_pg.source import companion_name
from sbert_pg.system import ColumnIdentity
from sbert_pg.types.indexed import VectorIndex, declared_index, method_of
from sbert_pg.types.vector import VectorType

log = logging.getLogger("sbert_pg.alembic")

#: Rows that may be without a vector when an index is built: maintaining it for so few is cheap.
MAX_MISSING = 10_000

#: What a trigger, or a function, of this library's calls.
_OURS = re.compile(r"\bsbert\s*\.")

Key = tuple[str | None, str]
Place = tuple[str | None, str, str]


def rewrite(context: AutogenContext, upgrade_ops: UpgradeOps) -> None:
    """Rewrite Alembic's operations, in place."""
    if context.dialect.name != "postgresql" or context.connection is None:
        return
    comparison = Comparison(context, context.connection)
    comparison.read(upgrade_ops)
    comparison.compare()
    changes.refuse(comparison.changes)
    upgrade_ops.ops[:] = comparison.result()


class Comparison:
    """One run of autogenerate on one database."""

    def __init__(self, context: AutogenContext, connection: sa.Connection) -> None:
        self.context = context
        self.connection = connection
        self.default_schema = connection.dialect.default_schema_name
        self.tables = {self.key(t.schema, t.name): t for t in context.sorted_tables}
        self.bindings: dict[Place, Binding] = {
            (*self.key(b.schema, b.table), b.column): b for b in catalog.all_bindings(connection)
        }
        self.compatible = changes.compatible_names(connection) if self.bindings else {}
        self.created: set[Key] = set()
        self.added: set[Place] = set()
        self.index_tables: set[Key] = set()
        self.before: list[MigrateOperation] = []
        self.middle: list[MigrateOperation] = []
        self.after: list[MigrateOperation] = []
        self.required: set[Place] = set()
        self.finishing: dict[Place, ops.FinishReembeddingOp] = {}
        self.kept: set[Place] = set()
        #: Indexes that bindings have: their queue, and the rows that failed.
        self.queues = {name for b in self.bindings.values() for name in self._queues_of(b)}
        self.changes: list[changes.RefusedChange] = []

    def key(self, schema: str | None, table: str) -> Key:
        """A table as Alembic names it: without the search path's first schema."""
        return (None if schema == self.default_schema else schema, table)

    # What Alembic found.

    def read(self, upgrade_ops: UpgradeOps) -> None:
        """Sort Alembic's operations, and replace those that are about embedding columns."""
        ordered = in_drop_order(upgrade_ops.ops, self.key)
        others = [op for op in ordered if not _is_ours(op)]
        dropped = {
            self.key(op.schema, op.table_name)
            for op in others
            if isinstance(op, alembic_ops.DropTableOp)
        }
        for op in others:
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
        own = (op.schema, key[1])
        self.middle += [
            self._bind_op(own, column.name, self._declaration(key, column))
            for column in self._embeddings(table)
        ]
        self.middle += [
            CreateVectorIndexOp.of(definition, concurrently=False, name=index.name)
            for index, definition in self._declared_indexes(table, op.schema)
        ]

    def _dropped_table(self, op: alembic_ops.DropTableOp) -> None:
        key = self.key(op.schema, op.table_name)
        for (schema, table, column), binding in self.bindings.items():
            if (schema, table) == key:
                bound = self._bind_op((op.schema, table), column, _declared(binding))
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
                if method_of(index) is not None:
                    if not is_dropped:
                        self.index_tables.add(key)
                elif (*key, inner.index_name) not in self.queues:
                    kept.append(inner)
            elif not self._column(key, inner):
                kept.append(inner)
        if is_dropped:
            dropped = vector_indexes(self.connection, key[1], schema=op.schema)
            self.middle += [DropVectorIndexOp.of(each, concurrently=False) for each in dropped]
        if kept:
            op.ops[:] = kept
            self.middle.append(op)

    def _column(self, key: Key, op: MigrateOperation) -> bool:
        """Take an operation on a column over, where it is about an embedding column."""
        if isinstance(op, alembic_ops.AddColumnOp) and isinstance(op.column.type, Embedding):
            self.added.add((*key, op.column.name))
            return True
        if self._is_companion(key, op):
            return True
        if isinstance(op, alembic_ops.DropColumnOp):
            binding = self.bindings.get((*key, op.column_name))
            if binding is not None:
                self._drop(key, binding)
            return binding is not None
        if isinstance(op, alembic_ops.AlterColumnOp):
            return self._altered(key, op)
        return False

    def _is_companion(self, key: Key, op: MigrateOperation) -> bool:
        """Whether an operation is on a companion that comes and goes with its embedding column."""
        column = getattr(op, "column", None)
        name = getattr(op, "column_name", None) if column is None else column.name
        table = self.tables.get(key)
        columns = [] if table is None else list(table.columns)
        companions = {companion_name(c.name) for c in columns if isinstance(c.type, Embedding)}
        bound = {b.companion for place, b in self.bindings.items() if place[:2] == key}
        return name in companions | bound

    def _queues_of(self, binding: Binding) -> Iterator[Place]:
        unquoted = self.connection.dialect.identifier_preparer.unformat_identifiers
        for index in catalog.queue_indexes(self.connection, binding):
            if index.existing is not None:
                yield (*self.key(binding.schema, binding.table), list(unquoted(index.existing))[-1])

    def _altered(self, key: Key, op: alembic_ops.AlterColumnOp) -> bool:
        """Never change the type of a column whose vectors would not survive it."""
        place = (*key, op.column_name)
        table = self.tables.get(key)
        column = None if table is None else _column_named(table, op.column_name)
        type_ = None if column is None else column.type
        changes_vector = op.modify_type is not None and isinstance(type_, VectorType)
        bound = place in self.bindings
        if not bound and not isinstance(type_, Embedding):
            if changes_vector:
                self._refuse_if_filled(place, op)
            return False
        if changes_vector:
            if not bound:
                changes.refuse_width(place, op.existing_type, op.modify_type)
            # What became of a bound column is found by comparing it with its binding.
            op.modify_type = None
        if op.modify_nullable is False:
            self.before.append(self._require(place, 0))
        return not op.has_changes()

    def _refuse_if_filled(self, place: Place, op: alembic_ops.AlterColumnOp) -> None:
        old, new = op.existing_type, op.modify_type
        if getattr(old, "dimensions", None) == getattr(new, "dimensions", None):
            return
        if holds_vectors(self.connection, ColumnIdentity(*place)):
            changes.refuse_width(place, old, new)

    def _drop(self, key: Key, binding: Binding) -> None:
        """Drop a bound column that the models do not have any more, if its time has come."""
        place = (*key, binding.column)
        replacement = self._replacement_of(key, binding)
        added = self._add_op(key, binding.column, _declared(binding))
        if replacement is None:
            self.before.append(
                ops.DropEmbeddingColumnOp(key[1], binding.column, schema=key[0], added=added)
            )
        elif (*key, replacement) in self.bindings:
            self.finishing[place] = ops.FinishReembeddingOp(
                key[1], binding.column, schema=key[0], added=added, replacement=replacement
            )
            self.before.append(self.finishing[place])
        else:
            self.kept.add(place)
            log.warning(
                "%s is left in place until %r, which is to replace it, is complete; then run "
                "autogenerate again, which writes the operation that drops it.",
                binding,
                replacement,
            )

    def _replacement_of(self, key: Key, binding: Binding) -> str | None:
        """The declared column that replaces a bound one, by the database or by the models."""
        table = self.tables.get(key)
        for column in [] if table is None else self._embeddings(table):
            other = self.bindings.get((*key, column.name))
            replaced = {_type_of(column).replaces, None if other is None else other.replaces}
            if binding.column in replaced:
                return column.name
        return None

    def _declared_places(self, key: Key) -> set[Place]:
        table = self.tables.get(key)
        return set() if table is None else {(*key, c.name) for c in self._embeddings(table)}

    # What Alembic does not look at.

    def compare(self) -> None:
        """Compare bindings and vector indexes of the tables that are there."""
        for key, table in self.tables.items():
            if key in self.created or not self._in_scope(table):
                continue
            replaced = {c.name: self._declaration(key, c).replaces for c in self._embeddings(table)}
            changes.refuse_two(table, replaced)
            self._compare_bindings(key, table)
            self.middle += changes.changed_texts(self.connection, table)
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
                declared = self._declaration(key, column)
                self.after.append(self._bind_op(key, column.name, declared, concurrently=True))
            else:
                names = self.compatible.get(binding.id, set())
                change = changes.refused_change(binding, column, names)
                change = change or self._replacement_change(key, binding, column)
                if change is not None:
                    self.changes.append(change)
                elif problems := catalog.health(self.connection, binding):
                    log.warning("%s is to be bound again: %s", binding, "; ".join(problems))
                    bound = self._bind_op(key, column.name, _declared(binding), concurrently=True)
                    self.after.append(bound)
        for place, binding in self.bindings.items():
            plain = _column_named(table, binding.column)
            if place[:2] == key and plain is not None:
                self._compare_plain(key, plain, binding)

    def _compare_plain(self, key: Key, column: sa.Column[Any], binding: Binding) -> None:
        """A bound column that the models declare as something else is let go."""
        if isinstance(column.type, Embedding):
            return
        bound = self._bind_op(
            key, column.name, _declared(binding), discard_vectors=True, concurrently=True
        )
        self.before.append(
            ops.UnbindEmbeddingColumnOp(
                key[1], column.name, schema=key[0], bound=bound, concurrently=True
            )
        )

    def _replacement_change(
        self, key: Key, binding: Binding, column: sa.Column[Any]
    ) -> changes.RefusedChange | None:
        """Whether the models say differently which column this one replaces."""
        declared = self._declaration(key, column).replaces
        bound = binding.replaces
        if bound is not None and (*key, bound) not in self._declared_places(key):
            # The old column goes now, and with it what it was replaced by.
            return None
        if declared == bound:
            return None
        return changes.RefusedChange(
            binding, column, f"replaces={bound!r} became {declared!r}", False
        )

    def _compare_indexes(self, key: Key, table: sa.Table) -> None:
        superfluous = {
            index.name: index
            for index in vector_indexes(self.connection, key[1], schema=key[0])
            if self.context.run_name_filters(
                index.name, "index", {"table_name": key[1], "schema_name": key[0]}
            )
        }
        for index, definition in self._declared_indexes(table, key[0]):
            stored = superfluous.pop(definition.name, None)
            existing = stored if stored is not None and stored.valid else None
            if existing is not None and same_index(self.connection, definition, existing):
                continue
            self._require_filled(key, _column_named(table, definition.column))
            self.after.append(
                CreateVectorIndexOp.of(definition, existing=existing, name=index.name)
            )
        self._superfluous(key, superfluous)

    def _require_filled(self, key: Key, column: sa.Column[Any] | None) -> None:
        """An index on an embedding column is built once its rows have vectors."""
        if column is None or not isinstance(column.type, Embedding):
            return
        place = (*key, column.name)
        if place not in self.required:
            self.after.append(self._require(place, MAX_MISSING))
        self.required.add(place)

    def _superfluous(self, key: Key, found: dict[str, StoredIndex]) -> None:
        for definition in found.values():
            reflected = sa.Index(definition.name)
            if not self.context.run_object_filters(reflected, definition.name, "index", True, None):
                continue
            place = (*key, definition.column)
            # Whoever still uses the old column needs its index until the column goes.
            if place in self.finishing:
                self.finishing[place].indexes.append(CreateVectorIndexOp.of(definition))
            elif place not in self.kept:
                self.before.insert(0, DropVectorIndexOp.of(definition))

    # Pieces.

    def _embeddings(self, table: sa.Table) -> list[sa.Column[Any]]:
        """Embedding columns, a replaced one before its replacement."""
        columns = [
            column
            for column in table.columns
            if isinstance(column.type, Embedding)
            and self.context.run_object_filters(column, column.name, "column", False, None)
        ]
        return sorted(columns, key=lambda column: _depth(table, column))

    def _declared_indexes(
        self, table: sa.Table, schema: str | None
    ) -> Iterator[tuple[sa.Index, VectorIndex]]:
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            if method_of(index) is None:
                continue
            name = _final_name(index, self.context.dialect)
            if self.context.run_object_filters(index, name, "index", False, None):
                yield index, declared_index(index, name, schema)

    def _declaration(self, key: Key, column: sa.Column[Any]) -> Embedding:
        """As declared; a column that is gone, or was never there, is not replaced any more."""
        type_ = _type_of(column)
        old = type_.replaces
        if old is None or (*key, old) in self.bindings or (*key, old) in self._declared_places(key):
            return type_
        return Embedding(type_.encoder, type_.source, storage=type_.storage)

    def _bind_op(self, key: Key, column: str, declared: Embedding, **options: Any) -> Any:
        return ops.BindEmbeddingColumnOp.of(key[1], column, declared, schema=key[0], **options)

    def _add_op(self, key: Key, column: str, declared: Embedding) -> ops.AddEmbeddingColumnOp:
        kind = ops.AddEmbeddingColumnOp if declared.replaces is None else ops.BeginReembeddingOp
        add: ops.AddEmbeddingColumnOp = kind.of(key[1], column, declared, schema=key[0])
        return add

    def _require(self, place: Place, max_missing: int) -> ops.RequireBackfillOp:
        schema, table, column = place
        return ops.RequireBackfillOp(table, column, max_missing=max_missing, schema=schema)

    def result(self) -> list[MigrateOperation]:
        """All operations, in an order in which they work."""
        operations = [*self.before, *self.middle, *self.after]
        declaring = any(isinstance(op, ops.DeclaringOperation) for op in operations)
        if declaring or self._has_embeddings():
            current, head = catalog.current(self.connection), catalog.head()
            behind = current is None or (current != head and current in reached(head))
            if behind or (declaring and not self._history_installs()):
                operations.insert(0, ops.UpgradeSchemaOp(head, previous=current))
        return operations

    def _has_embeddings(self) -> bool:
        return any(
            self._in_scope(table) and self._embeddings(table) for table in self.tables.values()
        )

    def _history_installs(self) -> bool:
        """Whether a revision of the application's history makes the schema ``sbert``.

        Where none does, the schema was installed by hand, and an empty database would lack it.
        """
        script = self.context.migration_context.script
        if script is None:
            return bool(self.bindings)
        call = f"{ops.UpgradeSchemaOp.name}("
        return any(
            call in Path(revision.path).read_text(encoding="utf-8", errors="replace")
            for revision in script.walk_revisions()
        )


def _is_ours(operation: MigrateOperation) -> bool:
    """Whether an operation is on something that belongs to the schema ``sbert`` or to a binding.

    Also one of alembic_utils, which would drop each trigger and extension that is not registered
    with it: its operations have a ``target`` with a signature and a definition.
    """
    target = getattr(operation, "target", None)
    schemas = {getattr(operation, "schema", None), getattr(target, "schema", None)}
    if catalog.SCHEMA in schemas:
        return True
    is_extension = type(target).__name__ == "PGExtension"
    if is_extension and getattr(target, "signature", None) == "vector":
        return True
    definition = getattr(target, "definition", None)
    return isinstance(definition, str) and _OURS.search(definition) is not None


def _final_name(index: sa.Index, dialect: sa.Dialect) -> str:
    """An index's name after naming conventions, cut to the server's length."""
    preparer = dialect.identifier_preparer
    (name,) = preparer.unformat_identifiers(preparer.format_constraint(index) or "")
    return str(name)


def _type_of(column: sa.Column[Any]) -> Embedding:
    assert isinstance(column.type, Embedding)
    return column.type


def _declared(binding: Binding) -> Embedding:
    return Embedding(
        binding.declared, binding.source, storage=binding.storage, replaces=binding.replaces
    )


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
