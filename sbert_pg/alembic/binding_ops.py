"""Operations on embedding columns that are there: binding, backfill, compatible encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alembic.operations import Operations
from alembic.operations.ops import MigrateOperation

from sbert_pg.alembic.base import ColumnOperation, NothingOp, unknown
from sbert_pg.alembic.column_ops import DeclaringOperation
from sbert_pg.alembic.declaration import Declaration
from sbert_pg.distance import Similarity
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec


class BindEmbeddingColumnOp(DeclaringOperation):
    """Bind a vector column that is there."""

    name = "bind_embedding_column"

    def __init__(
        self,
        table_name: str,
        column_name: str,
        declaration: Declaration,
        *,
        schema: str | None = None,
        mark_pending: bool = False,
        trust_vectors: bool = False,
        concurrently: bool = False,
    ) -> None:
        super().__init__(
            table_name, column_name, declaration, schema=schema, mark_pending=mark_pending
        )
        self.trust_vectors = trust_vectors
        self.concurrently = concurrently

    @property
    def online(self) -> bool:  # type: ignore[override]
        """Only the concurrent form leaves the migration's transaction."""
        return self.concurrently

    @classmethod
    def bind_embedding_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        encoder: str | EncoderSpec,
        source: str | Sequence[str] | Source,
        separator: str = "\n\n",
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        replaces: str | None = None,
        mark_pending: bool = False,
        trust_vectors: bool = False,
        concurrently: bool = False,
        schema: str | None = None,
    ) -> Any:
        """Bind a vector column that is there to its encoder and source.

        For a table that the same migration creates, and for a column that was there before. A
        column that holds vectors already is refused, since nobody has shown which encoder made
        them: ``sbert-pg adopt`` does, and binds it.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            encoder: as in ``embedding_column``.
            source: as in ``embedding_column``.
            separator: as in ``embedding_column``.
            dimensions: as in ``embedding_column``.
            similarity: as in ``embedding_column``.
            replaces: the column that this one is to replace, which is bound.
            mark_pending: see ``add_embedding_column``.
            trust_vectors: take it that the vectors that are there are this encoder's, of this
                source.
            concurrently: commit what came before and bind in a short transaction that is tried
                again where its lock cannot be had; else in the migration's transaction, which
                keeps writers out until its end.
            schema: schema of the table.

        Raises:
            AlreadyBoundError: it is bound to another encoder or source.
            NotProvenError: it holds vectors.
            BindingError: it cannot be bound; the message says why.
        """
        declaration = Declaration.of(
            encoder,
            source,
            separator=separator,
            dimensions=dimensions,
            similarity=similarity,
            replaces=replaces,
        )
        return operations.invoke(
            cls(
                table_name,
                column_name,
                declaration,
                schema=schema,
                mark_pending=mark_pending,
                trust_vectors=trust_vectors,
                concurrently=concurrently,
            )
        )

    def reverse(self) -> MigrateOperation:
        """Unbind it."""
        return UnbindEmbeddingColumnOp(
            self.table_name,
            self.column_name,
            schema=self.schema,
            bound=self,
            concurrently=self.concurrently,
        )


class UnbindEmbeddingColumnOp(ColumnOperation):
    """Take the triggers and the binding away; the column and its vectors stay."""

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
        bound: BindEmbeddingColumnOp | None = None,
        concurrently: bool = False,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.bound = bound
        self.concurrently = concurrently

    @property
    def online(self) -> bool:  # type: ignore[override]
        """Only the concurrent form leaves the migration's transaction."""
        return self.concurrently

    @classmethod
    def unbind_embedding_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        concurrently: bool = False,
        schema: str | None = None,
    ) -> Any:
        """Make an embedding column a plain vector column again; its vectors stay.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            concurrently: see ``bind_embedding_column``.
            schema: schema of the table.
        """
        return operations.invoke(
            cls(table_name, column_name, schema=schema, concurrently=concurrently)
        )

    def reverse(self) -> MigrateOperation:
        """Bind it again."""
        return self.bound if self.bound is not None else unknown(self, "binding")

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The binding that is too many."""
        return ("unbind_embedding_column", *self.place)


class RebindEmbeddingColumnOp(ColumnOperation):
    """Accept another encoder of the same vector space."""

    online = True

    def __init__(
        self,
        table_name: str,
        column_name: str,
        encoder: EncoderSpec,
        *,
        schema: str | None = None,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.encoder = encoder

    @classmethod
    def rebind_embedding_column(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        encoder: str | EncoderSpec,
        dimensions: int | None = None,
        schema: str | None = None,
    ) -> Any:
        """Accept an encoder for a bound column after proving that it shares the column's space.

        For another precision or export of the same model. The encoder is loaded and its probe
        vectors are compared with the column's; the measured agreement is written to the catalog.
        The vectors stay as they are.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            encoder: the further encoder, which this process can load.
            dimensions: as in ``embedding_column``.
            schema: schema of the table.

        Raises:
            EncoderMismatchError: the spaces differ; such a change is a new column.
            EncoderError: the encoder cannot be loaded.
        """
        spec = EncoderSpec.of(encoder, dimensions=dimensions)
        return operations.invoke(cls(table_name, column_name, spec, schema=schema))

    def reverse(self) -> MigrateOperation:
        """Nothing: an encoder that has been proven stays proven."""
        return NothingOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The encoder that is not known for the column."""
        return ("rebind_embedding_column", *self.place, self.encoder.name)


class FollowRenameOp(ColumnOperation):
    """Have bindings follow a column that was renamed."""

    def __init__(
        self, table_name: str, column_name: str, new_name: str, *, schema: str | None = None
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.new_name = new_name

    @classmethod
    def follow_rename(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        new_name: str,
        *,
        schema: str | None = None,
    ) -> Any:
        """Have bindings follow a column that this migration has just renamed.

        To be written directly after ``op.alter_column(..., new_column_name=...)`` of an embedding
        column, of a column of its source, or of the table's key. Nothing is embedded again.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column's old name.
            new_name: its new name.
            schema: schema of the table.
        """
        return operations.invoke(cls(table_name, column_name, new_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        """The other way round."""
        return FollowRenameOp(self.table_name, self.new_name, self.column_name, schema=self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The two names."""
        return ("follow_rename", *self.place, self.new_name)


class RequireBackfillOp(ColumnOperation):
    """Go on only where a column's rows have their vectors."""

    online = True

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        max_missing: int = 0,
        schema: str | None = None,
    ) -> None:
        super().__init__(table_name, column_name, schema=schema)
        self.max_missing = max_missing

    @classmethod
    def require_backfill(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        max_missing: int = 0,
        schema: str | None = None,
    ) -> Any:
        """Fail the migration while rows of an embedding column are without their vectors.

        What the migration did before is committed first, so the column can be filled and the same
        ``alembic upgrade`` run again.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            max_missing: rows that may be without a vector. Before an index is built some thousands
                do no harm: they only cost more when they are written.
            schema: schema of the table.

        Raises:
            BackfillIncompleteError: more rows are without; with the figures and the command to run.
        """
        return operations.invoke(
            cls(table_name, column_name, max_missing=max_missing, schema=schema)
        )

    def reverse(self) -> MigrateOperation:
        """Nothing."""
        return NothingOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The column."""
        return ("require_backfill", *self.place)


class BackfillEmbeddingsOp(ColumnOperation):
    """Fill a column in place."""

    online = True

    @classmethod
    def backfill_embeddings(
        cls,
        operations: Operations,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
    ) -> Any:
        """Fill an embedding column within the migration, for small applications.

        The encoder is loaded in this process. Progress is shown where standard error is a terminal;
        an interrupted backfill goes on where it was when the migration is run again.

        Args:
            operations: given by Alembic.
            table_name: the table.
            column_name: the column.
            schema: schema of the table.

        Raises:
            EncoderError: the encoder cannot be loaded.
        """
        return operations.invoke(cls(table_name, column_name, schema=schema))

    def reverse(self) -> MigrateOperation:
        """Nothing."""
        return NothingOp()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """The column."""
        return ("backfill_embeddings", *self.place)
