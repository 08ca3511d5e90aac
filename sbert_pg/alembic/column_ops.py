"""Operations that add and drop embedding columns of tables in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation

from sbert_pg.alembic.base import ColumnOperation, NothingOp, SequenceOp, unknown
from sbert_pg.alembic.declaration import Declaration
from sbert_pg.distance import Similarity, Storage
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec


class DeclaringOperation(ColumnOperation):
    """An operation that says what a column's encoder and source are."""

    name: ClassVar[str]

    def __init__(
        self,
        table_name: str,
        column_name: str,
        declaration: Declaration,
        *,
        schema: str | None = None,
        mark_pending: bool = False,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.declaration = declaration
        self.mark_pending = mark_pending

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Name of the operation, place, encoder and source."""
        declared = self.declaration
        return (self.name, *self.place, declared.encoder.name, str(declared.source))


class AddEmbeddingColumnOp(DeclaringOperation):
    """Add a vector column, bind it, and have its triggers notice every change from then on."""

    online = True
    name = "add_embedding_column"

    @classmethod
    def add_embedding_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        separator: str = "\n\n",
        storage: Storage = "vector",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        mark_pending: bool = False,
        schema: str | None = None,
    ) -> Any:
        """Add an embedding column to a table in use: column, binding and triggers.

        The column takes ``NULL``, since existing rows have no vector yet. Each statement has a
        short transaction of its own, waits a moment for its lock, gives way and tries again; what
        the migration did before is committed first. Done twice it changes nothing.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the new column.
            encoder: as in ``embedding_column``.
            source: as in ``embedding_column``.
            separator: as in ``embedding_column``.
            storage: as in ``embedding_column``.
            dimensions: as in ``embedding_column``.
            similarity: as in ``embedding_column``.
            mark_pending: mark the rows that exist as pending, so that a worker embeds them.
                Without it they are left to ``sbert-pg backfill``.
            schema: schema of the table.

        Raises:
            TableBusyError: the table's lock could not be had; the message says who holds it.
        """
        declaration = Declaration.of(
            encoder,
            source,
            separator=separator,
            storage=storage,
            dimensions=dimensions,
            similarity=similarity,
        )
        return operations.invoke(
            cls(table_name, column_name, declaration, schema=schema, mark_pending=mark_pending)
        )

    def reverse(self) -> MigrateOperation:
        """Drop the column."""
        return DropEmbeddingColumnOp(
            self.table_name, self.column_name, schema=self.schema, added=self
        )


class BeginReplacementOp(AddEmbeddingColumnOp):
    """Add a column that is to replace another one, for a change of encoder: *expand*."""

    name = "begin_replacement"

    @classmethod
    def begin_replacement(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        replaces: str,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        separator: str = "\n\n",
        storage: Storage = "vector",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        mark_pending: bool = False,
        schema: str | None = None,
    ) -> Any:
        """Add an embedding column that is to replace another; both are kept fresh from now on.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the new column.
            replaces: the old column, which is bound.
            encoder: as in ``embedding_column``.
            source: as in ``embedding_column``.
            separator: as in ``embedding_column``.
            storage: as in ``embedding_column``.
            dimensions: as in ``embedding_column``.
            similarity: as in ``embedding_column``.
            mark_pending: see ``add_embedding_column``.
            schema: schema of the table.

        Raises:
            NotBoundError: the old column is not bound.
            TableBusyError: the table's lock could not be had; the message says who holds it.
        """
        declaration = Declaration.of(
            encoder,
            source,
            separator=separator,
            storage=storage,
            dimensions=dimensions,
            similarity=similarity,
            replaces=replaces,
        )
        return operations.invoke(
            cls(table_name, column_name, declaration, schema=schema, mark_pending=mark_pending)
        )


class DropEmbeddingColumnOp(ColumnOperation):
    """Take the triggers and the binding away and drop the column."""

    online = True

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
        added: AddEmbeddingColumnOp | None = None,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.added = added

    @classmethod
    def drop_embedding_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
    ) -> Any:
        """Drop an embedding column with its binding, triggers, marks and indexes.

        Works as ``add_embedding_column`` does: in short transactions, with retries, and again.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            schema: schema of the table.

        Raises:
            TableBusyError: the table's lock could not be had; the message says who holds it.
        """
        return operations.invoke(cls(table_name, column_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        """Add the column again; its rows are pending then."""
        return self.added if self.added is not None else unknown(self, "column")

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The column that is too many."""
        return ("drop_embedding_column", *self.place)


class FinishReplacementOp(DropEmbeddingColumnOp):
    """Drop the column that another one has replaced: *contract*."""

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
        force: bool = False,
        quiet: float = 300.0,
        added: AddEmbeddingColumnOp | None = None,
        indexes: Sequence[MigrateOperation] = (),
        replacement: str | None = None,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema, added=added)
        self.force = force
        self.quiet = quiet
        #: The column that has replaced it.
        self.replacement = replacement
        #: Operations that build the indexes again which go with the column.
        self.indexes = list(indexes)

    @classmethod
    def finish_replacement(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        force: bool = False,
        quiet: float = 300.0,
        schema: str | None = None,
    ) -> Any:
        """Drop an embedding column that has been replaced, once nobody uses it any more.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the old column.
            force: drop it although it is still read or written.
            quiet: seconds for which it must not have been used.
            schema: schema of the table.

        Raises:
            BackfillIncompleteError: the new column is not complete, or lacks its index.
            StillInUseError: the old column is still in use.
            TableBusyError: the table's lock could not be had; the message says who holds it.
        """
        return operations.invoke(
            cls(table_name, column_name, schema=schema, force=force, quiet=quiet)
        )

    def reverse(self) -> MigrateOperation:
        """Add the column again, with its indexes, and go on with the change."""
        steps = [super().reverse(), *self.indexes]
        if self.replacement is not None:
            steps.append(
                ResumeReplacementOp(
                    self.table_name, self.replacement, self.column_name, schema=self.schema
                )
            )
        return SequenceOp(steps) if len(steps) > 1 else steps[0]

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The column that is too many."""
        return ("finish_replacement", *self.place)


class ResumeReplacementOp(ColumnOperation):
    """Say again that a column is to replace another: the inverse of *contract* ends with it."""

    online = True

    def __init__(
        self, table_name: str, column_name: str, replaces: str, *, schema: str | None = None
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.replaces = replaces

    @classmethod
    def resume_replacement(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        replaces: str,
        schema: str | None = None,
    ) -> Any:
        """Go on with a change of encoder after its old column has been added again.

        The new column keeps its encoder, its vectors and its marks; from now on the table is
        watched for writers of the old column, as it was before ``finish_replacement``. Done twice
        it changes nothing.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the new column, which is bound.
            replaces: the old column, which is bound again.
            schema: schema of the table.

        Raises:
            NotBoundError: one of the two is not bound.
            TableBusyError: the table's lock could not be had; the message says who holds it.
        """
        return operations.invoke(cls(table_name, column_name, replaces, schema=schema))

    def reverse(self) -> MigrateOperation:
        """Nothing: dropping the old column ends the change."""
        return NothingOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The two columns."""
        return ("resume_replacement", *self.place, self.replaces)
