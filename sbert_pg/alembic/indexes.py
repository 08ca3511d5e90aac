"""Operations on vector indexes, and how they are carried out, without locking anybody out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation

from sbert_pg.alembic import statements
from sbert_pg.alembic.ops import MEMORY, SbertOperation, operation
from sbert_pg.alembic.statements import is_enclosed, online, require_left, within, write
from sbert_pg.alembic.toimpl import carry_out
from sbert_pg.distance import INDEX_METHODS, IndexMethod
from sbert_pg.errors import DeclarationError
from sbert_pg.indexes import index_builder
from sbert_pg.indexes.build import CreateIndexConcurrently, drop_index, name_beside
from sbert_pg.types.indexed import VectorIndex, as_number, form_of, sql_of

#: Seconds that building or dropping an index concurrently waits for transactions in its way. The
#: lock it holds meanwhile (SHARE UPDATE EXCLUSIVE) stops neither readers nor writers, and giving up
#: would throw a finished build away.
INDEX_LOCK_TIMEOUT = 600.0

#: Attempts to build or drop an index concurrently, each of which waits as long as it may.
INDEX_ATTEMPTS = 3
#: Rows up to which an index is built in a transaction that the application itself began.
SMALL_TABLE = 10_000


@dataclass(eq=False)
class IndexOperation(SbertOperation):
    """An operation on one vector index.

    Args:
        index_name: its name; marked by ``op.f()`` where a naming convention has been applied.
        concurrently: whether it leaves the migration's transaction.
        lock_timeout: seconds to wait for transactions in its way, at each of three attempts.
    """

    index_name: str
    table_name: str
    _: KW_ONLY
    concurrently: bool = True
    lock_timeout: float = INDEX_LOCK_TIMEOUT
    schema: str | None = None

    @property
    def place(self) -> tuple[str | None, str, str]:
        """Schema, table and name."""
        return self.schema, self.table_name, str(self.index_name)

    def builder(self, connection: sa.Connection, **options: Any) -> AbstractContextManager[Any]:
        """What builds and drops indexes of the table concurrently."""
        return index_builder(
            connection, self.table_name, self.schema,
            lock_timeout=self.lock_timeout, attempts=INDEX_ATTEMPTS, **options,
        )  # fmt: skip

    def _alike(self) -> dict[str, Any]:
        """What an operation has in common with its inverse."""
        return {
            "concurrently": self.concurrently,
            "lock_timeout": self.lock_timeout,
            "name": self.index_name,
        }


@operation("create_vector_index")
@dataclass(kw_only=True, eq=False)
class CreateVectorIndexOp(IndexOperation):
    """Build a vector index while the table is read and written.

    What the migration did before is committed first. A valid index of this name is kept; an invalid
    one, as an interrupted build leaves behind, is dropped first.

    Args:
        index_name: its name.
        element: name of the column, or ``sa.text()`` of an expression such as
            ``(embedding::halfvec(384))``.
        using: access method: ``"hnsw"``, ``"ivfflat"``, ``"diskann"`` or ``"vchordrq"``.
        opclass: its operator class.
        options: storage parameters, such as ``{"m": 16, "ef_construction": 128}``.
        where: predicate of a partial index, as text.
        tablespace: tablespace, where it is not the default one.
        replace: where an index of this name is there and differs, build the new one beside it, then
            drop the old one and rename.
        maintenance_work_mem: memory for the build, as in ``"2GB"``; an HNSW graph that fits is
            built several times faster.
        concurrently: ``False`` builds it in the migration's transaction, and blocks writers
            meanwhile: for a table that the same migration creates.
        lock_timeout: seconds that a concurrent build waits for transactions that were there before
            it, at each of three attempts. While it waits it stops neither readers nor writers, and
            giving up throws the build away, so it is long.

    Raises:
        TableBusyError: a lock could not be had; the message says who holds it.
        DeclarationError: ``using`` is none of these.
    """

    element: Any = field(kw_only=False)
    using: IndexMethod = "hnsw"
    opclass: str | None = None
    options: Mapping[str, Any] | None = None
    where: Any = None
    tablespace: str | None = None
    replace: bool = False
    maintenance_work_mem: str | None = None
    existing: VectorIndex | None = field(default=None, metadata=MEMORY)
    definition: VectorIndex = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.using not in INDEX_METHODS:
            raise DeclarationError(
                f"create_vector_index: {self.using!r} makes no vector index; use one of "
                f"{', '.join(INDEX_METHODS)}, or op.create_index for other indexes."
            )
        text = None if isinstance(self.element, str) else sql_of(self.element)
        self.options = {str(key): as_number(v) for key, v in (self.options or {}).items()}
        self.where = None if self.where is None else sql_of(self.where)
        self.replace = self.replace or self.existing is not None
        self.definition = VectorIndex(
            name=str(self.index_name),
            table=self.table_name,
            schema=self.schema,
            column=self.element if text is None else "",
            element=text,
            form="column" if text is None else form_of(text),
            method=self.using,
            opclass=self.opclass,
            options=self.options,
            predicate=self.where,
            tablespace=self.tablespace,
        )

    @classmethod
    def of(
        cls, definition: VectorIndex, *, name: str | None = None, **options: Any
    ) -> CreateVectorIndexOp:
        """The operation that builds an index; ``name`` as Alembic has it, marked where conventions
        apply.
        """
        expression = definition.expression
        create = cls(
            definition.name if name is None else name,
            definition.table,
            definition.column if expression is None else sa.literal_column(expression),
            using=definition.method,
            opclass=definition.opclass,
            options=definition.options,
            where=definition.where,
            tablespace=definition.tablespace,
            schema=definition.schema,
            **options,
        )
        create.definition = definition
        return create

    def reverse(self) -> MigrateOperation:
        """Drop it; or build the one that it replaced."""
        if self.existing is not None:
            return type(self).of(self.existing, existing=self.definition, **self._alike())
        return DropVectorIndexOp.of(self.definition, **self._alike())

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The index that is missing, or differs; with how it differs."""
        if self.existing is None:
            return (self.name, *self.place)
        return ("replace_vector_index", *self.place, *differences(self.existing, self.definition))


@operation("drop_vector_index")
@dataclass(kw_only=True, eq=False)
class DropVectorIndexOp(IndexOperation):
    """Drop a vector index while the table is read and written, if it is there.

    Args:
        index_name: its name.
        concurrently: ``False`` drops it in the migration's transaction, under a lock on the table.
        lock_timeout: as in ``create_vector_index``.

    Raises:
        TableBusyError: a lock could not be had; the message says who holds it.
    """

    dropped: VectorIndex | None = field(default=None, metadata=MEMORY)

    @classmethod
    def of(
        cls, definition: VectorIndex, *, name: str | None = None, **options: Any
    ) -> DropVectorIndexOp:
        """The operation that drops an index, and can build it again."""
        return cls(
            definition.name if name is None else name,
            definition.table,
            schema=definition.schema,
            dropped=definition,
            **options,
        )

    def reverse(self) -> MigrateOperation:
        """Build it again."""
        if self.dropped is None:
            raise self._unknown("index")
        return CreateVectorIndexOp.of(self.dropped, **self._alike())


def differences(old: VectorIndex, new: VectorIndex) -> list[str]:
    """In which details two indexes differ, as ``m: 16 to 32``."""
    before, after = old.effective_options, new.effective_options
    lines = [
        f"{key}: {before.get(key)} to {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    for detail in ("method", "opclass", "column", "expression", "where"):
        left, right = getattr(old, detail), getattr(new, detail)
        if left != right:
            lines.append(f"{detail}: {left} to {right}")
    return lines


@carry_out.register
def _create_vector_index(operation: CreateVectorIndexOp, operations: Operations) -> None:
    """Build an index, unless the one that is wanted is there."""
    definition = operation.definition
    if not operation.concurrently or _is_small_and_enclosed(operations, operation.relation):
        with within(operations, operation.relation) as runner:
            if operation.replace:
                runner.execute(drop_index(definition.name, operation.schema, concurrently=False))
            runner.execute(sa.schema.CreateIndex(definition.to_index(), if_not_exists=True))
        return
    require_left(operations, f"Building index {definition.name!r} concurrently")
    with online(operations, operation.relation, lock_timeout=operation.lock_timeout) as runner:
        if runner.as_sql:
            _write_index(operation, operations)
            return
        memory = operation.maintenance_work_mem
        with operation.builder(runner.connection, maintenance_work_mem=memory) as builder:
            names = [definition.name, name_beside(definition.name)]
            builder.wait_for_others(names, operation.lock_timeout)
            builder.replace(definition, keep_valid=not operation.replace)


def _write_index(operation: CreateVectorIndexOp, operations: Operations) -> None:
    definition, memory = operation.definition, operation.maintenance_work_mem
    if memory is not None:
        value = sa.func.set_config("maintenance_work_mem", memory, sa.false())
        write(operations, sa.select(value))
    if operation.replace:
        write(operations, drop_index(definition.name, operation.schema, concurrently=True))
    write(operations, CreateIndexConcurrently(definition.to_index(), if_not_exists=True))
    write(operations, statements.require_valid(definition.name, definition.schema))
    if memory is not None:
        write(operations, sa.text("RESET maintenance_work_mem"))


def _is_small_and_enclosed(operations: Operations, relation: str) -> bool:
    """Whether the table is small and nothing can happen outside of the transaction anyway."""
    if not is_enclosed(operations):
        return False
    rows = sa.select(sa.literal(1)).select_from(sa.text(relation)).offset(SMALL_TABLE).limit(1)
    return operations.get_bind().execute(rows).first() is None


@carry_out.register
def _drop_vector_index(operation: DropVectorIndexOp, operations: Operations) -> None:
    name = str(operation.index_name)
    if not operation.concurrently or is_enclosed(operations):
        with within(operations, operation.relation) as runner:
            runner.execute(drop_index(name, operation.schema, concurrently=False))
        return
    with online(operations, operation.relation, lock_timeout=operation.lock_timeout) as runner:
        if runner.as_sql:
            runner.execute(drop_index(name, operation.schema, concurrently=True))
            return
        with operation.builder(runner.connection) as builder:
            builder.drop(name)
            builder.drop(name_beside(name))
