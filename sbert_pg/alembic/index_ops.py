"""Operations on vector indexes, which are built and dropped without locking anybody out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation

from sbert_pg.alembic.base import SbertOperation
from sbert_pg.alembic.declaration import IndexDefinition, sql_of
from sbert_pg.distance import INDEX_METHODS
from sbert_pg.errors import DeclarationError

#: Seconds that building or dropping an index concurrently waits for transactions in its way. The
#: lock it holds meanwhile (SHARE UPDATE EXCLUSIVE) stops neither readers nor writers, and giving up
#: would throw a finished build away.
INDEX_LOCK_TIMEOUT = 600.0


class IndexOperation(SbertOperation):
    """An operation on one vector index."""

    @property
    def online(self) -> bool:  # type: ignore[override]
        """Only the concurrent form leaves the migration's transaction."""
        return self.concurrently

    def __init__(
        self,
        definition: IndexDefinition,
        *,
        concurrently: bool = True,
        lock_timeout: float = INDEX_LOCK_TIMEOUT,
        name: Any = None,
    ) -> None:
        self.definition = definition
        self.concurrently = concurrently
        self.lock_timeout = lock_timeout
        #: The name as Alembic has it: marked where a naming convention has been applied.
        self.name = name if name is not None else definition.name

    @property
    def place(self) -> tuple[str | None, str, str]:
        """Schema, table and name."""
        return self.definition.schema, self.definition.table, self.definition.name


class CreateVectorIndexOp(IndexOperation):
    """Build a vector index."""

    def __init__(
        self,
        definition: IndexDefinition,
        *,
        concurrently: bool = True,
        existing: IndexDefinition | None = None,
        replace_existing: bool = False,
        maintenance_work_mem: str | None = None,
        lock_timeout: float = INDEX_LOCK_TIMEOUT,
        name: Any = None,
    ) -> None:
        super().__init__(
            definition, concurrently=concurrently, lock_timeout=lock_timeout, name=name
        )
        self.existing = existing
        self.replace_existing = replace_existing or existing is not None
        self.maintenance_work_mem = maintenance_work_mem

    @classmethod
    def create_vector_index(
        cls,
        operations: Operations,
        index_name: str,
        table_name: str,
        element: Any,
        *,
        using: str = "hnsw",
        opclass: str | None = None,
        options: Mapping[str, Any] | None = None,
        where: Any = None,
        tablespace: str | None = None,
        concurrently: bool = True,
        replace: bool = False,
        maintenance_work_mem: str | None = None,
        lock_timeout: float = INDEX_LOCK_TIMEOUT,
        schema: str | None = None,
    ) -> Any:
        """Build a vector index while the table is read and written.

        What the migration did before is committed first. A valid index of this name is kept; an
        invalid one, as an interrupted build leaves behind, is dropped and built anew.

        Args:
            operations: given by Alembic.
            index_name: its name.
            table_name: the table.
            element: name of the column, or ``sa.text()`` of an expression such as
                ``(embedding::halfvec(384))``.
            using: ``"hnsw"`` or ``"ivfflat"``.
            opclass: pgvector's operator class.
            options: storage parameters, such as ``{"m": 16, "ef_construction": 128}``.
            where: predicate of a partial index, as text.
            tablespace: tablespace, where it is not the default one.
            concurrently: ``False`` builds it in the migration's transaction, and blocks writers
                meanwhile: for a table that the same migration creates.
            replace: where an index of this name is there and differs, build the new one beside it,
                then drop the old one and rename.
            maintenance_work_mem: memory for the build, as in ``"2GB"``; an HNSW graph that fits is
                built several times faster.
            lock_timeout: seconds that a concurrent build waits for transactions that were there
                before it, at each of three attempts. While it waits it stops neither readers nor
                writers, and giving up throws the build away, so it is long.
            schema: schema of the table.

        Raises:
            TableBusyError: a lock could not be had; the message says who holds it.
            DeclarationError: ``using`` is neither of the two.
        """
        if using not in INDEX_METHODS:
            raise DeclarationError(
                f"create_vector_index: {using!r} is no method of pgvector's; use one of "
                f"{', '.join(INDEX_METHODS)}, or op.create_index for other indexes."
            )
        text = None if isinstance(element, str) else sql_of(element)
        definition = IndexDefinition(
            name=index_name,
            table=table_name,
            schema=schema,
            column=element if isinstance(element, str) else "",
            expression=text,
            using=using,
            opclass=opclass,
            options={key: str(value) for key, value in (options or {}).items()},
            where=None if where is None else sql_of(where),
            tablespace=tablespace,
        )
        return operations.invoke(
            cls(
                definition,
                concurrently=concurrently,
                replace_existing=replace,
                maintenance_work_mem=maintenance_work_mem,
                lock_timeout=lock_timeout,
            )
        )

    def reverse(self) -> MigrateOperation:
        """Drop it; or build the one that it replaced."""
        if self.existing is not None:
            return CreateVectorIndexOp(
                self.existing,
                concurrently=self.concurrently,
                existing=self.definition,
                lock_timeout=self.lock_timeout,
                name=self.name,
            )
        return DropVectorIndexOp(
            self.definition,
            concurrently=self.concurrently,
            lock_timeout=self.lock_timeout,
            name=self.name,
        )

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The index that is missing, or differs; with how it differs."""
        if self.existing is None:
            return ("create_vector_index", *self.place)
        return ("replace_vector_index", *self.place, *differences(self.existing, self.definition))


class DropVectorIndexOp(IndexOperation):
    """Drop a vector index."""

    @classmethod
    def drop_vector_index(
        cls,
        operations: Operations,
        index_name: str,
        table_name: str,
        *,
        concurrently: bool = True,
        lock_timeout: float = INDEX_LOCK_TIMEOUT,
        schema: str | None = None,
    ) -> Any:
        """Drop a vector index while the table is read and written, if it is there.

        Args:
            operations: given by Alembic.
            index_name: its name.
            table_name: the table.
            concurrently: ``False`` drops it in the migration's transaction, under a lock on the
                table.
            lock_timeout: as in ``create_vector_index``.
            schema: schema of the table.

        Raises:
            TableBusyError: a lock could not be had; the message says who holds it.
        """
        definition = IndexDefinition(index_name, table_name, schema, column="")
        return operations.invoke(
            cls(definition, concurrently=concurrently, lock_timeout=lock_timeout)
        )

    def reverse(self) -> MigrateOperation:
        """Build it again."""
        if not self.definition.column and self.definition.expression is None:
            raise DeclarationError(
                f"Index {self.definition.name!r} cannot be brought back: this operation does not "
                "know what it was. Write the inverse by hand."
            )
        return CreateVectorIndexOp(
            self.definition,
            concurrently=self.concurrently,
            lock_timeout=self.lock_timeout,
            name=self.name,
        )

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The index that is too many."""
        return ("drop_vector_index", *self.place)


def differences(old: IndexDefinition, new: IndexDefinition) -> list[str]:
    """In which details two indexes differ, as ``m: 16 to 32``."""
    before, after = old.effective_options, new.effective_options
    found = [
        f"{key}: {before.get(key)} to {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    same = replace(new, name=old.name, options={}, schema=old.schema)
    for detail in ("using", "opclass", "column", "expression", "where"):
        left, right = getattr(old, detail), getattr(same, detail)
        if left != right:
            found.append(f"{detail}: {left} to {right}")
    return found
